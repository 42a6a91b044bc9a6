"""The whole road in small: two iterations a stage, a few prompts; and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("--num-prompts", "4", "--teacher-prompts", "2", "--seed", "3")


def quickstart(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TMD_EVAL_TRAIN__ITERATIONS": "5",
        "TMD_EVAL_TRAIN__DATA__CLIPS": "64",
        "TMD_EVAL_TRAIN__BATCH": "2",
        "TMD_EVAL_HOME": str(out.parent / "home"),
    }
    return subprocess.run(
        [sys.executable, "-m", "tmd_eval.cli", "quickstart", "--out", str(out), *SMALL, *flags],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = quickstart(out, "--json")
    assert done.returncode == 0, done.stderr
    return out, done


def test_report_sets_the_student_against_its_teacher_and_the_undistilled_one(made):
    out, done = made
    report = json.loads((out / "report" / "report.json").read_text())
    assert json.loads(done.stdout)["rows"] == report["rows"]
    assert report["command"].startswith(f"tmd-eval quickstart --out {out} --seed 3")
    rows = {row["role"]: row for row in report["rows"]}
    assert set(rows) == {"student", "teacher", "undistilled"}
    assert rows["student"]["m"] == rows["undistilled"]["m"] and rows["teacher"]["m"] == 50
    assert rows["student"]["effective_nfe"] == pytest.approx(rows["student"]["m"] * 1.2)
    assert rows["student"]["metrics"]["alignment_joint"]["n"] == 8
    assert rows["teacher"]["metrics"]["alignment_joint"]["n"] == 4
    for name in ("index.html", "leaderboard.md", "figures/quality.png"):
        assert (out / "report" / name).stat().st_size > 0
    assert (out / "tmd-eval.db").is_file()


def test_a_second_run_makes_nothing_again(made):
    out, _ = made

    def times() -> dict[str, int]:
        kept = [*out.glob("stage*/checkpoint/*"), *out.glob("runs/*/videos/*")]
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before, page = times(), (out / "report" / "index.html").read_bytes()
    (out / "runs" / "student" / "videos" / "00001-0.mp4").unlink()
    assert quickstart(out).returncode == 0
    changed = {Path(name).name for name, when in times().items() if before[name] != when}
    assert changed == {"00001-0.mp4"}
    assert len(page) > 0


def test_other_settings_in_the_same_folder_are_refused(made):
    out, _ = made
    done = quickstart(out, "--seed", "4")
    assert done.returncode == 2 and "seed" in done.stderr


def test_an_interrupted_training_names_the_command_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from students import train as trainer
    from students.trainer_state import TrainingInterrupted
    from tmd_eval.quickstart import Quickstart, distil

    def interrupted(*_: object, **__: object) -> Path:
        raise TrainingInterrupted("interrupted at iteration 3")

    monkeypatch.setattr(trainer, "train", interrupted)
    plan = Quickstart(out=tmp_path / "q")
    with pytest.raises(TrainingInterrupted, match=f"go on with: {plan.command}") as caught:
        distil(plan)
    assert caught.value.exit_code == 130
