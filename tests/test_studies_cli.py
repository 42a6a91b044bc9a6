"""The commands of ``tmd-eval study``: the whole road, frozen JSON keys, and errors of one sentence."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.studykit import MODELS, make_set, make_study, prompts
from tmd_eval.cli import app
from tmd_eval.rerun import rerun

KEYS = {
    "create": "clips database folder prompts raters schedule_hash study trials_per_rater votes",
    "simulate": "raters study votes",
    "status": "audit quality raters schedule_hash sheets simulated study unblinded votes",
    "unblind": "study unblinded votes wanted",
    "analyze": (
        "code_revision command created excluded_raters models raters results schedule_hash simulated study votes "
        "wanted_votes"
    ),
    "results": "a b high low method n_prompts n_raters n_votes p_holm p_value question ties value wins_a wins_b",
    "export": "blind files rows",
    "power": (
        "design_effect detectable independent item level prompt prompts rater raters rows seed seeds side simulations "
        "test votes votes_per_item"
    ),
}
"""Keys of each command's ``--json``; users' scripts rely on them."""


def call(*words: str) -> Any:
    result = CliRunner().invoke(app, ["study", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for shade, name in enumerate("ab"):
        make_set(folder / name, prompts(4), seeds=1, shade=shade, frames=2)
    return folder


def test_the_whole_road(sets: Path, tmp_path: Path):
    study, db = str(tmp_path / "first"), ("--db", str(tmp_path / "v.db"))
    create = (
        "create", "--videos", f"a={sets / 'a'}", "--videos", f"b={sets / 'b'}", "--out", study, "--num-prompts", "4",
        "--seeds", "1", "--votes-per-item", "3", "--trials-per-rater", "4", "--catch-share", "0.25", *db, "--json",
    )  # fmt: skip
    planned = call(*create, "--dry-run")
    assert planned["votes"] == 12 and not (tmp_path / "first").exists()
    found = {"create": call(*create), "simulate": call("simulate", study, "--quality", "a=1", *db, "--json")}
    found["status"] = call("status", study, *db, "--json")
    assert found["status"]["votes"]["main"] == 12 and found["status"]["unblinded"] is None
    assert "votes: main 12" in call("status", study, *db)
    blind = CliRunner().invoke(app, ["study", "analyze", study, *db])
    assert blind.exit_code != 0 and "study unblind" in str(blind.exception)
    found["unblind"] = call("unblind", study, "--reason", "test", *db, "--json")
    found["analyze"] = call("analyze", study, "--out", str(tmp_path / "out"), *db, "--json")
    found["results"] = found["analyze"]["results"][0]
    assert found["analyze"] == json.loads((tmp_path / "out" / "preferences.json").read_text())
    shown = call("analyze", study, *db)
    report = json.loads((tmp_path / "first" / "analysis" / "report.json").read_text())
    assert report["command"].endswith(f"--out {study}/analysis"), "a report says where it went, for tmd-eval rerun"
    assert shown.startswith("SIMULATED") and "visual quality: a over b" in shown
    found["export"] = call("export", study, "--out", str(tmp_path / "votes"), *db, "--json")
    found["power"] = call("power", "--num-prompts", "10", "--raters", "5", "--simulations", "50", "--json")
    assert found["power"]["test"] == "larger p of clustered logit and permutation"
    assert {name: sorted(value) for name, value in found.items()} == {
        name: sorted(keys.split()) for name, keys in KEYS.items()
    }


def test_a_report_keeps_the_contract_and_can_be_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study, db = make_study(tmp_path, models=3, count=4, votes_per_item=2, frames=2)
    call("simulate", str(study), "--quality", f"{MODELS[0]}=1", "--db", db)
    call("unblind", str(study), "--reason", "test", "--db", db)
    words = ["study", "analyze", str(study), "--out", str(tmp_path / "out"), "--db", db]
    monkeypatch.setattr(sys, "argv", ["tmd-eval", *words])
    facts = call(*words[1:], "--json")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["command"] == shlex.join(["tmd-eval", *words]) and report["simulated"] and report["device"]
    assert report["seeds"] == [0] and report["packages"]["numpy"] and "simulated" in report["raters"]
    assert [line["action"] for line in report["audit"]] == ["created", "simulated", "unblinded", "analyzed"]
    assert report["audit"][0]["command"] == "test", "kept in the sealed schedule until then"
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert list(rows) == list(MODELS)
    for result in facts["results"]:
        ours = rows[result["a"]][f"{result['question']}, preferred to {result['b']}"]
        theirs = rows[result["b"]][f"{result['question']}, preferred to {result['a']}"]
        assert (ours["value"], ours["low"], ours["high"]) == (result["value"], result["low"], result["high"])
        assert ours["n"] == theirs["n"] == result["n_votes"]
        assert (theirs["value"], theirs["low"]) == pytest.approx((1 - ours["value"], 1 - ours["high"]))
    assert all(m["low"] <= m["value"] <= m["high"] for metrics in rows.values() for m in metrics.values())
    compared = rerun(tmp_path / "out", tmp_path / "again")
    assert len(compared) == sum(len(metrics) for metrics in rows.values())
    assert all(row["old"] == row["new"] for row in compared), "the same votes, the same figures"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["create", "--videos", "a", "--out", "x"], "NAME=DIR"),
        (["create", "--videos", "a=absent", "--videos", "b=absent", "--out", "x"], "No video set"),
        (["status", "absent"], "No study at"),
        (["power", "--raters", "1"], "raters must be at least 2"),
        (["simulate", "absent", "--quality", "a"], "MODEL=LOGODDS"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["study", *words])
    assert getattr(result.exception, "exit_code", None) == 2 and sentence in str(result.exception)
    assert "\n" not in str(result.exception) and not any(tmp_path.iterdir())


def test_prompts_in_another_encoding_are_one_sentence(sets: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_bytes("ein großer Hund".encode("latin-1"))
    words = ["create", "--videos", f"a={sets / 'a'}", "--videos", f"b={sets / 'b'}", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, ["study", *words, "--prompts", str(tmp_path / "prompts.txt")])
    assert getattr(result.exception, "exit_code", None) == 2 and "save them as UTF-8" in str(result.exception)
