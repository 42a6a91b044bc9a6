"""The official package gives the official numbers, and gaps are named instead of averaged away."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from students.errors import ConfigError, EnvironmentMissingError, IncompleteError
from tests.tiny import tiny_pipeline
from tmd_eval.commands.vbench import app as vbench_app
from tmd_eval.prompts import vbench_prompts
from tmd_eval.vbench import environment, runner, weights, worker
from tmd_eval.vbench import score as scoring
from tmd_eval.vbench.dimensions import DIMENSIONS
from tmd_eval.video import write_video

OFFICIAL = {
    "00_child_swings_rusty_swing_set.mp4": 0.9560519947725183,
    "01_impressionist_rubber_duck_sunset.mp4": 0.9732440780190861,
    "02_two_cyclists_stop_sign.mp4": 0.9675764719645182,
}
FLICKER = "temporal_flickering"


@pytest.fixture(scope="session")
def vbench_environment() -> Path:
    """The managed environment, built if need be; skips where that is impossible, fails under CI."""
    try:
        environment.setup()
    except EnvironmentMissingError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    return environment.folder()


@pytest.fixture
def small_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of two prompts of the dimension and one of another, instead of the 946."""
    entries = [("a still cup", [FLICKER]), ("a clock.", [FLICKER]), ("a running dog", ["motion_smoothness"])]
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": p, "dimension": d} for p, d in entries]))
    monkeypatch.setattr(runner, "full_info", lambda: info)
    monkeypatch.setattr(runner, "official_version", lambda: "0.1.5")
    monkeypatch.setattr(runner, "check_ready", lambda dimension, unverified=False: None)
    monkeypatch.setattr(weights, "hashes", lambda dimension: {})


def clip(path: Path, levels: tuple[int, ...] = (10, 20, 30)) -> Path:
    """A grey clip, one level a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.repeat(np.array(levels, np.uint8), 16 * 16 * 3).reshape(-1, 16, 16, 3)
    write_video(path, frames, 8, lossless=True)
    return path


def invoke(*arguments: str) -> Any:
    tree = typer.Typer(pretty_exceptions_enable=False)
    tree.add_typer(vbench_app, name="vbench")
    tree.command("other")(lambda: None)
    return CliRunner().invoke(tree, ["vbench", *arguments])


def worker_says(monkeypatch: pytest.MonkeyPatch, value: Callable[[str], float | None]) -> list[list[str]]:
    """Put a function of the file's name in the place of the worker process; returns the names of each request."""
    asked: list[list[str]] = []

    def ask(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append([Path(video["path"]).name for video in request["videos"]])
        with Path(request["results"]).open("a") as file:
            for video, name in zip(request["videos"], asked[-1], strict=True):
                row = {"key": video["key"], "value": value(name), "extra": {}, "seconds": 0.1}
                file.write(json.dumps(row) + "\n")
        return {"ok": True}

    monkeypatch.setattr(runner, "_ask", ask)
    return asked


def summary(run: Path) -> dict[str, Any]:
    path = run / "scores" / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def test_official_scores_of_the_reference_clips(vbench_environment: Path, shared: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos with spaces"
    videos.mkdir()
    for name in OFFICIAL:
        (videos / name).symlink_to(shared / "data" / "clips" / name)
    (videos / "._00.mp4").write_bytes(b"stray")
    (videos / "notes.txt").write_text("stray")
    result = invoke("--videos", str(videos), "--dimensions", FLICKER, "--out", str(tmp_path / "run"), "--json")
    assert result.exit_code == 0, result.exception
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores" / f"{FLICKER}.jsonl").read_text().splitlines()]
    assert {row["video"]: row["value"] for row in rows} == pytest.approx(OFFICIAL, abs=1e-6)
    summary = json.loads((tmp_path / "run" / "scores" / "summary.json").read_text())[FLICKER]
    assert summary == json.loads(result.stdout)["scores"][FLICKER]
    assert set(summary) == {"n", "value", "low", "high", "completeness", "metric_version", "weight_hashes"}
    record = json.loads((tmp_path / "run" / "scores" / "vbench.json").read_text())
    assert record["protocol"]["set"] == "custom" and record["totals"] is None and not record["not_measured"]
    assert summary["value"] == pytest.approx(np.mean(list(OFFICIAL.values())), abs=1e-12)
    assert summary["n"] == 3 and summary["completeness"] == 1 and summary["metric_version"] == "vbench-0.1.5"
    assert 0 <= summary["low"] < min(OFFICIAL.values()) and max(OFFICIAL.values()) < summary["high"] <= 1
    assert runner.official_version() == "0.1.5"


def test_flickering_in_closed_form(vbench_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By relative names of folders, as people type them; the worker runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "videos" / "a_still.mp4", (77,) * 5)
    clip(tmp_path / "videos" / "b_strobe.mp4", (0, 255, 0, 255))
    clip(tmp_path / "videos" / "c_steps.mp4", (10, 20, 30, 61))
    clip(tmp_path / "videos" / "façades; $(x) 'q'.mp4")
    result = invoke("--videos", "videos", "--dimensions", FLICKER, "--out", "relative_name", "--device", "cpu")
    assert result.exit_code == 0, result.exception
    lines = (tmp_path / "relative_name" / "scores" / f"{FLICKER}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["value"] for r in rows] == pytest.approx([1, 0, 1 - (10 + 10 + 31) / 3 / 255, 1 - 10 / 255], abs=1e-6)


def test_doctor_tells_each_dimension_s_state(vbench_environment: Path) -> None:
    result = invoke("doctor", "--json")
    report = json.loads(result.stdout)
    assert set(report) == {"version", "dimensions", "long"} and report["version"] == "0.1.5"
    assert set(report["long"]) == {"official_code", "problems"}
    assert "ImportError" in report["long"]["official_code"] or "No module" in report["long"]["official_code"]
    assert {"dreamsim_ensemble_checkpoint.zip", "background_mapping_table.yaml"} <= {
        Path(path).name for path in report["long"]["problems"]["background_consistency"]
    }
    rows = {row["dimension"]: row for row in report["dimensions"]}
    assert list(rows) == list(DIMENSIONS) and len(rows) == 16
    assert rows[FLICKER] | {"device": "x"} == {
        "dimension": FLICKER, "importable": True, "reason": None, "weights": {}, "missing_weights": [],
        "weight_problems": {}, "device": "x", "ready": True, "do": [],
    }  # fmt: skip
    detector = {"object_class", "multiple_objects", "color", "spatial_relationship"}
    assert {name for name, row in rows.items() if not row["importable"]} <= detector
    assert all("detectron2" in row["reason"] for row in rows.values() if not row["importable"])
    text = invoke("doctor").stdout
    assert "dimensions are ready" in text and "VBench-Long (--protocol long) lacks besides:" in text


def test_official_prompt_list(vbench_environment: Path) -> None:
    everything = vbench_prompts()
    assert len(everything.prompts) == 944 and len(everything.sha256) == 64
    assert len(vbench_prompts([FLICKER]).prompts) == 75
    assert len({everything.video_name(line, 0) for line in range(944)}) == 944


def test_a_checkpoint_from_generation_to_database(
    vbench_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "folder", lambda: tmp_path / "none")
    call = ["--ckpt", str(tiny_pipeline(tmp_path / "model")), "--out", str(tmp_path / "run"), "--m", "1"]
    call += ["--limit", "6", "--device", "cpu", "--db", str(tmp_path / "db.sqlite"), "--json"]
    dry = invoke(*call, "--dry-run")
    assert json.loads(dry.stdout) == {"videos": 6, "missing": 6, "dimensions": [FLICKER]}
    assert "not scored" in dry.stderr and "amt-s.pth" in dry.stderr  # no weights here
    assert not (tmp_path / "run").exists()
    result = invoke(*call)
    assert result.exit_code == 0, result.exception
    printed = json.loads(result.stdout)
    assert printed["recorded"] is not None and (tmp_path / "db.sqlite").exists()
    entry = printed["scores"][FLICKER]
    assert entry["n"] == 6 and entry["completeness"] == pytest.approx(6 / (75 * 5)) and entry["partial"]
    assert printed["totals"] is None and not printed["protocol"]["static_filter"]["applied"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["prompts"]["count"] == 944 and len(config["lines"]) == 75
    first = vbench_prompts([FLICKER]).prompts[0]
    assert (tmp_path / "run" / "videos" / f"{first}-4.mp4").is_file()


def test_broken_videos_are_named_and_nothing_is_written(tmp_path: Path, small_info: None) -> None:
    videos = tmp_path / "videos"
    whole = clip(videos / "whole.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "empty.mp4").write_bytes(b"")
    clip(videos / "single.mp4", (5,))
    with pytest.raises(IncompleteError, match=r"3 of 4.*cut\.mp4.*empty\.mp4.*single\.mp4") as caught:
        scoring.score(videos, tmp_path / "run", [FLICKER])
    assert caught.value.exit_code == 3 and not list(tmp_path.glob("run/scores/*.json*"))


def test_a_missing_video_of_the_standard_set_is_named(
    tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, levels = tmp_path / "videos", {"a still cup": (1, 1), "a clock.": (1, 52)}
    for prompt, grey in levels.items():
        for index in range(5):
            clip(videos / f"{prompt}-{index}.mp4", grey)
    clip(videos / "a running dog-0.mp4")  # of another dimension
    clip(videos / "a clock.-5.mp4")  # a sixth sample, which VBench ignores
    clip(videos / "holiday.mp4")
    worker_says(monkeypatch, lambda name: 0.5 if name.startswith("a still") else 0.9)
    scoring.score(videos, tmp_path / "run", [FLICKER], options=scoring.Options(static_filter=False))
    entry = json.loads((tmp_path / "run" / "scores" / "summary.json").read_text())[FLICKER]
    assert entry["n"] == 10 and entry["value"] == pytest.approx(0.7) and entry["completeness"] == 1
    assert (entry["low"], entry["high"]) == (0, 1)  # two prompts, not ten videos, say next to nothing
    error = capsys.readouterr().err
    assert "holiday.mp4" in error and "running" not in error
    (videos / "a clock.-3.mp4").unlink()
    with pytest.raises(IncompleteError, match=r"1 of 10.*a clock\.-3\.mp4"):
        scoring.score(videos, tmp_path / "again", [FLICKER], options=scoring.Options(static_filter=False))
    partial = scoring.score(
        videos, tmp_path / "again", [FLICKER], options=scoring.Options(allow_partial=True, static_filter=False)
    )
    assert partial["dimensions"][FLICKER]["partial"] and partial["dimensions"][FLICKER]["n"] == 9


def test_a_run_with_a_lost_video_is_incomplete(
    tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for line in range(3):
        clip(run / "videos" / f"{line:05d}-0.mp4")
    rows = [{"video": f"{line:05d}-0.mp4", "prompt": "same", "line": line, "index": 0} for line in range(3)]
    (run / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"prompts": {"count": 9}, "samples_per_prompt": 1, "limit": 4, "lines": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(IncompleteError, match=r"1 of 4.*00003-0\.mp4"):
        scoring.score(run, run, [FLICKER])
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "limit": 3}))
    (run / "scores").mkdir()
    (run / "scores" / "summary.json").write_text('{"alignment_joint": {"n": 3}}')
    worker_says(monkeypatch, lambda name: 0.5)
    for folder in (run, run / "videos"):
        entry = scoring.score(folder, run, [FLICKER])["dimensions"][FLICKER]
        assert (entry["n"], entry["low"], entry["high"]) == (3, None, None)  # a single prompt has no interval
    assert set(json.loads((run / "scores" / "summary.json").read_text())) == {"alignment_joint", FLICKER}


def test_a_value_that_is_no_number_is_not_measured(
    tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, run = tmp_path / "videos", tmp_path / "run"
    clip(videos / "a.mp4"), clip(videos / "b.mp4", (1, 2, 3))
    asked = worker_says(monkeypatch, lambda name: None if name == "b-0.mp4" else 0.5)
    with pytest.raises(scoring.NotMeasuredError, match=r"b\.mp4") as caught:
        scoring.score(videos, run, [FLICKER, "imaging_quality"])
    assert caught.value.exit_code == 3 and set(caught.value.record["not_measured"]) == {FLICKER, "imaging_quality"}
    assert not (run / "scores" / f"{FLICKER}.jsonl").exists() and FLICKER not in summary(run)
    before = len(asked)
    worker_says(monkeypatch, lambda name: 50.0)
    record = scoring.score(videos, run, ["imaging_quality"])
    assert record["dimensions"]["imaging_quality"]["value"] == pytest.approx(0.25 + 0.005 / 2)  # 0.5 and 50 of 100
    assert before == 2 and set(record["not_measured"]) == {FLICKER}


def test_without_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    clip(tmp_path / "videos" / "a.mp4")
    for arguments in (["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "run")], ["doctor"]):
        result = invoke(*arguments)
        assert isinstance(result.exception, EnvironmentMissingError) and result.exception.exit_code == 4
        assert "tmd-eval vbench setup" in str(result.exception)
    assert json.loads(invoke("setup", "--remove", "--json").stdout)["removed"] is False


def test_requests_that_cannot_be_met_say_why(tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(environment, "problem", lambda: None)
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="temporal_flickering"):
        runner.check_ready("temporal_flicker")
    with pytest.raises(EnvironmentMissingError, match=r"amt-s\.pth is missing.*setup --fetch"):
        runner.check_ready("motion_smoothness")
    for wrong in (["--out", "x"], ["--videos", "x"], ["--ckpt", "a", "--videos", "b", "--out", "x"]):
        assert isinstance(invoke(*wrong).exception, ConfigError)
    assert invoke().exit_code == 0 and "setup" in invoke().stdout


def test_options_that_would_do_nothing_are_refused_first(
    tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "problem", lambda: None)
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    clip(tmp_path / "videos" / "a.mp4")
    (tmp_path / "bad.json").write_text("[]")
    with_videos = ["--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "run")]
    with_ckpt = ["--ckpt", "micro", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("tmd_eval.generate.run", lambda *_, **__: pytest.fail("videos were generated"))
    for call, wrong, sentence in (
        (with_videos, ["--limit", "3", "--seed", "0"], "Leave out --seed, --limit, of no use with --videos"),
        (with_videos, ["--samples-per-prompt", "5"], "--samples-per-prompt, of no use"),
        (with_videos, ["--texts", "gpt"], "--texts, of no use"),
        (with_videos, ["--m", "2"], "--m, of no use"),
        (with_videos, ["--static-filter"], "--static-filter belongs to"),
        (with_videos, ["--prompt-file", str(tmp_path / "bad.json")], "must map each file name"),
        (with_ckpt, ["--prompt-file", str(tmp_path / "bad.json")], "--prompt-file, of no use with --ckpt"),
        (with_ckpt, ["--prompts", "micro", "--static-filter"], "--static-filter belongs to"),
    ):
        error = invoke(*call, "--dimensions", FLICKER, *wrong).exception
        assert isinstance(error, ConfigError) and sentence in str(error), (wrong, error)
    error = invoke(*with_ckpt, "--dimensions", FLICKER, "--static-filter").exception
    assert isinstance(error, EnvironmentMissingError) and "raft-things.pth is missing" in str(error)


def test_texts_of_a_whole_file_serve_its_first_prompts(tmp_path: Path) -> None:
    from tmd_eval.commands.vbench import _settings

    prompts, texts = tmp_path / "prompts.txt", tmp_path / "texts.txt"
    prompts.write_text("a\nb\nc\n")
    texts.write_text("long a\nlong b\nlong c\n")
    chosen, _ = _settings(str(prompts), str(texts), [FLICKER], 2, None, 0, None, None, None, None, None, None, False)
    assert (chosen.prompts, chosen.texts) == (("a", "b"), ("long a", "long b"))


def test_the_filter_s_25_samples_need_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tmd_eval.commands.vbench import _filtering

    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    assert not _filtering([FLICKER], None, None, un=False)
    raft = weights.folder() / "raft_model" / "models" / "raft-things.pth"
    raft.parent.mkdir(parents=True)
    raft.write_bytes(b"PK cut short")
    assert not _filtering([FLICKER], None, None, un=False)
    monkeypatch.setattr(weights, "problems", lambda name, unverified=False: {})
    assert _filtering([FLICKER], None, None, un=False) and not _filtering([FLICKER], None, 5, un=False)
    assert not _filtering([FLICKER], False, None, un=False) and not _filtering(["color"], None, None, un=False)


def test_videos_of_another_model_are_never_a_run_s(
    tmp_path: Path, small_info: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "problem", lambda: None)
    monkeypatch.setattr(weights, "prepare", lambda: None)
    monkeypatch.setattr("leaderboard.record.record_run", lambda db, run: 7)
    run, other = tmp_path / "run", tmp_path / "other"
    clip(run / "videos" / "00000-0.mp4"), clip(other / "00000-0.mp4", (9, 9))
    row = {"video": "00000-0.mp4", "prompt": "p", "line": 0, "index": 0}
    (run / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"prompts": {"count": 1}, "samples_per_prompt": 1, "lines": None}))
    worker_says(monkeypatch, lambda name: 0.5)
    call = ["--dimensions", FLICKER, "--device", "cpu", "--json", "--out"]
    refused = invoke("--videos", str(other), *call, str(run)).exception
    assert isinstance(refused, ConfigError) and "another --out" in str(refused) and not (run / "scores").exists()
    for videos in (run, run / "videos"):
        assert json.loads(invoke("--videos", str(videos), *call, str(run)).stdout)["recorded"] == 7
    assert json.loads(invoke("--videos", str(other), *call, str(tmp_path / "own")).stdout)["recorded"] is None


def test_setup_is_idempotent_and_a_failure_keeps_the_old_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    builds = 0

    def build(target: Path, log: Callable[[str], None]) -> None:
        nonlocal builds
        builds += 1
        link = environment._link(target)
        link.parent.mkdir(parents=True)
        link.write_text(environment._shared_text())
        if builds == 3:
            raise EnvironmentMissingError("no index")
        (target / environment.STAMP).write_text(json.dumps(environment.wanted()))

    monkeypatch.setattr(environment, "_build", build)
    assert environment.setup()["built"] and environment.problem() is None
    assert not environment.setup()["built"] and builds == 1
    assert environment.setup(force=True)["built"] and builds == 2
    with pytest.raises(EnvironmentMissingError):
        environment.setup(force=True)
    assert environment.problem() is None
    (environment.folder() / environment.STAMP).write_text(json.dumps({**environment.wanted(), "torch": "1.0"}))
    assert "torch was 1.0" in (environment.problem() or "")
    environment._link(environment.folder()).write_text("/gone\n")
    assert environment.problem() is not None
    assert environment.setup()["built"]
    environment._link(environment.folder()).write_text("/gone\n")  # the project's environment was made anew elsewhere
    assert "gone" in (environment.problem() or "")
    assert not environment.setup()["built"] and environment.problem() is None  # mended without an installation
    assert environment.remove() and environment.problem() == "is not installed"


def test_setup_says_what_it_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    plan = json.loads(invoke("setup", "--dry-run", "--dimensions", "motion_smoothness", "--json").stdout)
    assert plan["build"] == "is not installed" and "vbench==0.1.5" in plan["packages"] and not plan["detectron2"]
    assert list(plan["weights"]) == ["amt_model/amt-s.pth"] and plan["weights"]["amt_model/amt-s.pth"]["sources"]
    text = invoke("setup", "--dry-run").stdout
    assert "packages would be installed" in text and "raft-things.pth is missing: https://" in text
    assert not (tmp_path / "home").exists()


def test_workers_have_no_network(vbench_environment: Path) -> None:
    with pytest.raises(PermissionError):
        worker.refuse_network("socket.connect", (None, ("192.0.2.1", 80)))
    worker.refuse_network("socket.connect", (None, "/run/a.socket"))
    worker.refuse_network("open", ("x",))
    environment_variables = runner._environment()
    assert environment_variables["https_proxy"] == environment_variables["HTTP_PROXY"] == "http://127.0.0.1:9"
    assert environment_variables["HF_HUB_OFFLINE"] == "1"


def test_pins_are_exact() -> None:
    pins = environment.pins()
    assert pins[0].startswith("setuptools==") and all("==" in pin and "//" not in pin for pin in pins)
    assert "vbench==0.1.5" in pins
