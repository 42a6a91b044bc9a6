"""Time of the jobs, from steps measured on this machine and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from students.nfe import branches, effective_nfe
from students.run_folder import FREE_ON_RESUME
from students.settings import flatten
from tmd_eval.experiment.cells import Cell, Training
from tmd_eval.experiment.jobs import Job, folder, read_json
from tmd_eval.experiment.rows import digest

if TYPE_CHECKING:
    from students.base import Base

LOADING = 3.0
"""Seconds to load models for one job."""


class Estimator:
    """Knows which steps must be measured, reads those that were, and turns them into seconds a job."""

    def __init__(self, out: Path, base: Base, cells: Sequence[Cell]):
        """Find what must be measured: one training of every preset, and sampling and scoring of the base model.

        Args:
            out: folder of the run.
            base: the base model.
            cells: all cells.
        """
        self.out, self.base = out, base
        self._jobs: dict[str, Job] = {}
        trainings = (training for cell in cells for training in cell.trainings)
        for training in trainings:
            if training.preset not in self._jobs and training.config.kind.prepare is None:
                self._jobs[training.preset] = _training_job(training, base)
        evaluated = {"what": "sampling", "base": base.ref, "batch": _batch(cells)}
        name = f"sampling-{digest([evaluated, base.hash])[:12]}"
        self._sampling = Job(kind="measure", name=name, spec=evaluated)

    def jobs(self) -> Iterable[Job]:
        """The measurements."""
        return [self._sampling, *self._jobs.values()]

    def seconds(self, job: Job) -> float | None:
        """The estimate for a job, None before anything is measured."""
        sampling = read_json(folder(self.out, self._sampling))
        if sampling is None:
            return None
        if job.kind == "train":
            return self._training_seconds(job, sampling)
        if job.kind == "generate":
            passes = _passes(job.spec, self.base)
            each = sampling["seconds_fixed"] + passes * sampling["seconds_per_forward"]
            return LOADING + float(job.spec["videos"]) * each
        if job.kind == "score":
            return float(sampling["score_fixed"]) + float(job.spec["videos"]) * sampling["score_seconds"]
        return None

    def _training_seconds(self, job: Job, sampling: dict[str, Any]) -> float:
        own = self._jobs.get(job.spec["preset"])
        measured = read_json(folder(self.out, own)) if own else None
        per_forward = (
            sampling["seconds_per_forward"]
            if measured is None
            else measured["seconds_per_iteration"] / measured["compute_per_iteration"]
        )
        return LOADING + float(job.spec["compute"]) * per_forward


def _training_job(training: Training, base: Base) -> Job:
    """The measurement of a preset, by the first training that uses it; rates and seeds do not change its time."""
    config = training.config
    free = FREE_ON_RESUME | {"seed", "parent"}
    settings = {
        name: value
        for name, value in flatten(config.tree()).items()
        if name not in free and not name.startswith("optimiser.")
    }
    key = digest([training.preset, settings, base.hash])
    stem = Path(training.preset).stem
    spec = {"what": "training", "config": config.tree(), "preset": training.preset}
    return Job(kind="measure", name=f"{stem}-{key[:12]}", spec=spec)


def _batch(cells: Sequence[Cell]) -> int:
    return int(cells[0].settings["batch_size"]) if cells else 16


def _passes(spec: dict[str, Any], base: Base) -> float:
    """Forward passes of the whole model for one video."""
    row, settings = spec["row"], spec["settings"]
    n = settings["n"] or row["n"]
    if spec["checkpoint"] is None:
        guidance = base.guidance if row["guidance"] is None else row["guidance"]
        return float(row["m"] * branches(guidance))
    return effective_nfe(row["m"], n, row["h"], base.blocks if row["h"] is not None else None)
