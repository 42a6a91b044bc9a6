"""Rerun: which command it runs, and when two figures agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from students.errors import ConfigError, QualityGateError
from tmd_eval import rerun
from tmd_eval.cli import app


def metric(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def report(folder: Path, command: str, value: float = 0.5, half: float = 0.03) -> Path:
    folder.mkdir(parents=True)
    rows = [{"name": "student", "metrics": {"joint": metric(value, half)}}]
    (folder / "report.json").write_text(json.dumps({"command": command, "rows": rows}))
    return folder


@pytest.mark.parametrize("command", ["rm -rf /", "tmd-eval quickstart", "tmd-eval x --out", "sh -c 'tmd-eval --out a'"])
def test_only_our_own_commands_with_an_out_folder_are_run(tmp_path: Path, command: str):
    with pytest.raises(ConfigError, match="only tmd-eval commands with --out"):
        rerun.recorded_command(report(tmp_path / "r", command))


def test_a_run_records_its_command_too(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("command: tmd-eval micro --ckpt micro --out 'my run'\n")
    assert rerun.recorded_command(tmp_path) == ["micro", "--ckpt", "micro", "--out", "my run"]


def test_agreement_is_the_interval_of_a_difference(tmp_path: Path):
    """Two means of the same truth with honest 95 % intervals agree 95 % of the time."""
    rng = np.random.default_rng(0)
    n, trials, agreed = 200, 2000, 0
    for _ in range(trials):
        a, b = rng.normal(size=n), rng.normal(size=n)
        old, new = ({"x": metric(float(s.mean()), float(1.96 * s.std(ddof=1) / np.sqrt(n)))} for s in (a, b))
        agreed += next(rerun.compare(old, new))["agrees"]
    assert 0.93 < agreed / trials < 0.97


def test_missing_and_new_figures_do_not_agree():
    rows = list(rerun.compare({"a": metric(1, 0.1)}, {"b": metric(1, 0.1)}))
    assert [row["figure"] for row in rows] == ["a", "b"] and not any(row["agrees"] for row in rows)


def test_the_command_runs_again_into_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = report(tmp_path / "old", f"tmd-eval quickstart --out {tmp_path / 'old'} --seed 3")
    ran: list[list[str]] = []

    def call(words: list[str], **_: object) -> int:
        ran.append(words[3:])
        report(tmp_path / "new" / "report", "tmd-eval quickstart --out new", value=0.52)
        return 0

    monkeypatch.setattr(rerun.subprocess, "call", call)
    rows = rerun.rerun(old, tmp_path / "new")
    assert ran == [["quickstart", "--out", str(tmp_path / "new"), "--seed", "3"]]
    assert [row["agrees"] for row in rows] == [True]
    with pytest.raises(ConfigError, match="is not empty"):
        rerun.rerun(old, tmp_path / "new")


def test_a_report_is_compared_with_one_that_is_there(tmp_path: Path):
    """As after a matrix that was stopped, and finished with its own command; rows under two budgets stay apart."""
    old, new = tmp_path / "old", tmp_path / "new" / "report"
    for folder, values in ((old, (0.5, 0.7)), (new, (0.51, 0.9))):
        folder.mkdir(parents=True)
        rows = [
            {"name": "student", "budget": budget, "metrics": {"joint": metric(value, 0.03)}}
            for budget, value in zip(("updates", "compute"), values, strict=True)
        ]
        (folder / "report.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(QualityGateError, match="1 of 2 figures differ: student, compute / joint"):
        CliRunner().invoke(app, ["rerun", str(old), "--against", str(tmp_path / "new")], catch_exceptions=False)
    agrees = {row["figure"]: row["agrees"] for row in rerun.against(old, tmp_path / "new")}
    assert agrees == {"student, updates / joint": True, "student, compute / joint": False}
    with pytest.raises(ConfigError, match="has no figures"):
        rerun.against(old, tmp_path)
