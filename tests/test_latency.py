"""``tmd-eval latency``: parts add up, stand for what ran, and reach the database and the picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from leaderboard.database import reading
from leaderboard.models import Latency
from students.checkpoint import open_checkpoint
from students.errors import ConfigError
from tests.test_export import student_folder
from tests.tiny import tiny_pipeline
from tmd_eval.cli import app
from tmd_eval.latency import PARTS, DeviceClock, Protocol, dominant, measure
from tmd_eval.latency_figure import latency_figure


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=(1, 2, 2))


def test_clock_adds_up_what_a_part_took() -> None:
    clock = DeviceClock(torch.device("cpu"))
    with clock("total"):
        for part, seconds in (("backbone", 0.02), ("head", 0.01), ("backbone", 0.02)):
            with clock(part):
                time.sleep(seconds)
    found = clock.read()
    assert 0.04 <= found["backbone"] < found["total"] and 0.01 <= found["head"] < found["backbone"]


def test_command_side_by_side(pipeline: Path, tmp_path: Path) -> None:
    """A teacher, a plain student and a TMD student in one run."""
    tmd = student_folder(tmp_path / "tmd", pipeline, plain=False)
    plain = student_folder(tmp_path / "plain", pipeline, plain=True)
    words = ["latency", "--out", str(tmp_path / "out"), "--db", str(tmp_path / "board.db"), "--repeats", "3"]
    for ref in (pipeline, plain, tmd):
        words += ["--ckpt", str(ref)]
    result = CliRunner().invoke(app, [*words, "--teacher-m", "3", "--batch", "2", "--json"], catch_exceptions=False)
    shown = json.loads(result.stdout)
    assert shown == json.loads((tmp_path / "out" / "latency.json").read_text())
    assert {"command", "code_revision", "device", "packages", "created"} < set(shown)
    rows = shown["rows"]
    assert [(row["method"], row["effective_nfe"], row["guidance"]) for row in rows] == [
        ("teacher", 3.0, 3.0), ("dmd2v", 2.0, 1.0), ("tmd", 2.5, 1.0),
    ]  # fmt: skip
    for row in rows:
        seconds = {part: times["median"] for part, times in row["seconds"].items() if times}
        assert set(seconds) == {*PARTS, "total"} - ({"head"} if row["method"] != "tmd" else set())
        assert 0.5 * seconds["total"] < sum(seconds.values()) - seconds["total"] <= 1.2 * seconds["total"]
        assert all(t["p95"] >= t["median"] > 0 for t in row["seconds"].values() if t)
        assert (row["batch"], row["repeats"], row["frames"], row["height"]) == (2, 3, 9, 32)
        assert row["peak_memory_bytes"] > 10**7 and dominant(row) in PARTS
    assert (tmp_path / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")
    with reading(str(tmp_path / "board.db")) as session:
        assert [row.name for row in session.query(Latency).order_by(Latency.id)] == [row["name"] for row in rows]


def test_warm_up_is_not_counted_and_text_is_encoded_each_time(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(student_folder(tmp_path / "tmd", pipeline, plain=False))
    calls: list[int] = []
    encode = checkpoint.base.encode_prompts
    monkeypatch.setattr(
        checkpoint.base, "encode_prompts", lambda prompts: calls.append(len(prompts)) or encode(prompts)
    )
    slow = checkpoint.base.decode

    def decode(latents: Any) -> Any:
        time.sleep(0.5 if len(calls) == 1 else 0)  # as a first run on a GPU, which compiles and allocates
        return slow(latents)

    monkeypatch.setattr(checkpoint.base, "decode", decode)
    rows = measure(checkpoint, Protocol(repeats=2, warmup=1, batches=(1,), m=(1, 2)))
    assert calls == [1] * 6 and [row["m"] for row in rows] == [1, 2]  # one caption a run: no CFG, nothing cached
    assert rows[0]["seconds"]["vae"]["p95"] < 0.4


def test_networks_are_loaded_before_the_first_timed_run(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(pipeline)
    loaded: list[set[str]] = []

    def run(*_: Any) -> None:
        loaded.append({"transformer", "vae", "_text_pipeline"} & set(vars(checkpoint.base)))

    monkeypatch.setattr("tmd_eval.latency.run_once", run)
    measure(checkpoint, Protocol(repeats=1, warmup=0, teacher_m=1))
    assert loaded == [{"transformer", "vae", "_text_pipeline"}]


def test_picture_names_models_as_text(tmp_path: Path) -> None:
    times = {"median": 1.0, "p95": 1.1}
    row = {
        "name": "a<b>$x$&", "effective_nfe": 2.33, "guidance": 1.0, "batch": 1,
        "seconds": {**dict.fromkeys(PARTS, times), "total": {"median": 5.0, "p95": 5.2}},
    }  # fmt: skip
    text = latency_figure([row, {**row, "seconds": {**row["seconds"], "head": None}}], "cpu <1>", "svg").decode()
    assert "<b>" not in text and "a&lt;b&gt;$x$&amp;" in text and "1 s/video" not in text and "5 s/video" in text


@pytest.mark.parametrize(
    "words, what", [(["--repeats", "0"], "--repeats"), (["--batch", "0"], "--batch"), (["--warmup", "-1"], "--warmup"),
                    (["--m", "0"], "--m")],
)  # fmt: skip
def test_bad_numbers_are_refused(pipeline: Path, tmp_path: Path, words: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        CliRunner().invoke(
            app, ["latency", "--ckpt", str(pipeline), "--out", str(tmp_path / "x"), *words], catch_exceptions=False
        )
    assert not (tmp_path / "x").exists()


def test_dry_run_runs_nothing(pipeline: Path, tmp_path: Path) -> None:
    words = ["latency", "--ckpt", str(pipeline), "--dry-run", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "effective NFE 50" in result.stdout and not (tmp_path / "x").exists()
    shown = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert shown["batches"] == [1] and [row["effective_nfe"] for row in shown["rows"]] == [50]
