"""The whole road in the micro world: distil, generate, score, record, report.

Stage 1 and stage 2 of TMD run in this process; meanwhile a second one makes the teacher's videos (50 steps with CFG,
most of the sampling cost). Each part is a folder of the run and is skipped where it is complete, so an interrupted
quickstart goes on where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import typer

from students.errors import ConfigError, TmdError

PRESETS = ("micro_tmd_n2h2_stage1.yaml", "micro_tmd_n2h2_stage2.yaml")


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What a quickstart makes."""

    out: Path
    """Folder of everything."""
    seed: int = 0
    """Of both training stages and of the videos."""
    num_prompts: int = 512
    """Held-out captions for the student and for the undistilled teacher."""
    teacher_prompts: int = 128
    """Held-out captions for the teacher at 50 steps with CFG."""
    samples_per_prompt: int = 2
    """Videos a caption of the student and the undistilled teacher; diversity needs 2."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "teacher_prompts", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def command(self) -> str:
        """The command that makes the same again."""
        flags = (
            f"--seed {self.seed} --num-prompts {self.num_prompts} --teacher-prompts {self.teacher_prompts} "
            f"--samples-per-prompt {self.samples_per_prompt}"
        )
        return f"tmd-eval quickstart --out {self.out} {flags}"


def quickstart(plan: Quickstart) -> Path:
    """Run what is missing of a quickstart.

    Args:
        plan: what to make and where.

    Returns:
        Path of the report's index.html.

    Raises:
        ConfigError: the folder holds another quickstart.
        TmdError: a part failed; the message names its log.
    """
    import torch

    from leaderboard.record import record_run
    from leaderboard.report import build_report

    torch.set_num_threads(1)  # the teacher's process has the other core; also makes the figures repeatable
    plan.out.mkdir(parents=True, exist_ok=True)
    teacher = _Teacher(plan)
    try:
        student = distil(plan)
        from students.checkpoint import open_checkpoint

        m = open_checkpoint(str(student)).settings()["m"]
        _score(plan, "undistilled", "micro", num_prompts=plan.num_prompts, m=m)
        _score(plan, "student", str(student), num_prompts=plan.num_prompts)
        teacher.wait()
    finally:
        teacher.stop()
    database = f"sqlite:///{plan.out / 'tmd-eval.db'}"
    runs = {name: plan.out / "runs" / name for name in ("student", "undistilled", "teacher")}
    rows = {record_run(database, run): run for run in runs.values()}
    _say("writing the report")
    return build_report(
        database,
        plan.out / "report",
        title="Quickstart: a micro TMD student, its teacher, and the teacher undistilled",
        command=plan.command,
        rows=list(rows),
        clips=rows,
    )


def distil(plan: Quickstart) -> Path:
    """Train both stages with the presets of examples/; the checkpoint folder of stage 2."""
    from students.config import load_config
    from students.train import train
    from students.trainer_state import TrainingInterrupted

    checkpoint = None
    for number, preset in enumerate(PRESETS, start=1):
        path = Path(str(resources.files("tmd_eval") / "presets" / preset))
        config = replace(load_config(path), out=str(plan.out / f"stage{number}"), seed=plan.seed)
        if checkpoint is not None:
            config = replace(config, parent=str(checkpoint))
        _say(f"stage {number} of 2: {config.method_name}, {config.iterations} iterations")
        try:
            checkpoint = train(config, resume=True)
        except TrainingInterrupted:
            raise TrainingInterrupted(f"interrupted, the state is saved; go on with: {plan.command}") from None
    assert checkpoint is not None
    return checkpoint


def _score(plan: Quickstart, name: str, ckpt: str, *, num_prompts: int, m: int | None = None) -> None:
    from tmd_eval.generate import generate_run
    from tmd_eval.micro_scores import score_run
    from tmd_eval.prompts import load_prompts

    _say(f"videos and scores of the {name}")
    run = generate_run(
        ckpt, load_prompts("micro", count=num_prompts), plan.out / "runs" / name,
        samples_per_prompt=plan.samples_per_prompt, seed=plan.seed, m=m, batch_size=64, device="cpu",
    )  # fmt: skip
    score_run(run)


class _Teacher:
    """The teacher's run, made by a process of its own."""

    def __init__(self, plan: Quickstart) -> None:
        self.log = plan.out / "teacher.log"
        arguments = [
            "micro", "--ckpt", "micro", "--out", str(plan.out / "runs" / "teacher"), "--seed", str(plan.seed),
            "--num-prompts", str(plan.teacher_prompts), "--samples-per-prompt", str(plan.samples_per_prompt),
            "--batch-size", "64", "--device", "cpu",
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "import torch; torch.set_num_threads(1); from tmd_eval.cli import main; main()",
                 *arguments],
                stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self) -> None:
        _say("waiting for the teacher's videos" if self.process.poll() is None else "the teacher's videos are there")
        if self.process.wait():
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise TmdError(f"making the teacher's videos failed: {' '.join(last)} (log: {self.log})")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def _say(text: str) -> None:
    typer.echo(text, err=True)
