"""Jobs of an experiment and its folder: what is there, what is missing. Imports nothing heavy, for ``status`` is quick.

OUT/plan.json             the cells and jobs of the latest run
OUT/train/NAME-KEY/       run folders of students.train
OUT/cells/NAME-KEY/       video sets with their scores
OUT/measured/KEY.json     measured steps, for estimates of time
OUT/logs/JOB.log          what a job said; JOB.failed its error
OUT/tuning.json           trials and chosen settings
OUT/tmd-eval.db, OUT/report/

A cell whose folder holds record.json was imported (tmd_eval/experiment/records.py): its scores are here, its videos and
its student's weights are not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from students.errors import ConfigError
from tmd_eval.files import write_json

Kind = Literal["measure", "train", "generate", "score"]
PLAN = "plan.json"
RECORD = "record.json"
"""In the folder of a cell that was imported."""
DIVERGED = "diverged.txt"
"""In the folder of a training whose loss or gradient was not finite; deleting the folder trains it again."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work: its inputs decide its name, and its output says whether it is done."""

    kind: Kind
    name: str
    """Name of the output folder or file, which ends with the key of the inputs."""
    spec: dict[str, Any]
    """What the worker needs, plain values."""
    after: tuple[str, ...] = ()
    """Ids of the jobs whose output it needs."""
    seconds: float | None = None
    """Estimate, from measured steps."""

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell as plan.json and the status show it."""

    name: str
    section: str
    row: dict[str, Any]
    """Fields of :class:`tmd_eval.experiment.cells.Row`."""
    seed: int
    jobs: tuple[str, ...]
    """Ids of its jobs, in order; shared ones stand in several cells."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything an experiment is to do, as far as it is known."""

    file: str
    """The experiment file."""
    title: str
    cells: tuple[PlannedCell, ...]
    jobs: dict[str, Job] = field(default_factory=dict)
    """By id, in the order in which they are started."""
    waiting: tuple[str, ...] = ()
    """Methods whose tuning is not decided; the jobs of their cells are an estimate with the first trial's settings."""

    @property
    def allowed(self) -> dict[str, Job]:
        """The jobs that may run now: all but those that wait for the tuning."""
        ids = {key for cell in self.cells if not self.waits(cell) for key in cell.jobs}
        return {key: job for key, job in self.jobs.items() if key in ids or job.kind == "measure"}

    def waits(self, cell: PlannedCell) -> bool:
        """Whether a cell's settings hang on trials that are still to be made."""
        return cell.row["trial"] is None and cell.row["method"] in self.waiting


def save_plan(out: Path, plan: Plan) -> None:
    """Write plan.json."""
    write_json(out / PLAN, asdict(plan))


def load_plan(out: Path) -> Plan:
    """Read plan.json.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = out / PLAN
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["waiting"] = tuple(tree["waiting"])
        cells = tuple(PlannedCell(**{**cell, "jobs": tuple(cell["jobs"])}) for cell in tree.pop("cells"))
        jobs = {key: Job(**{**job, "after": tuple(job["after"])}) for key, job in tree.pop("jobs").items()}
        return Plan(cells=cells, jobs=jobs, **tree)
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no experiment yet; start one with: tmd-eval experiment run FILE.yaml") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); run the experiment again.") from None


def folder(out: Path, job: Job) -> Path:
    """Where a job's output lies."""
    if job.kind == "measure":
        return out / "measured" / f"{job.name}.json"
    return out / ("train" if job.kind == "train" else "cells") / job.name


def done(out: Path, job: Job) -> bool:
    """Whether a job's output is there and whole, as cheaply as can be told; of an imported cell, its scores."""
    place = folder(out, job)
    if job.kind == "measure":
        return place.is_file()
    if job.kind == "train":
        record = read_json(place / "checkpoint" / "student.json")
        return record is not None and record.get("training", {}).get("iteration") == job.spec["config"]["iterations"]
    if (place / RECORD).is_file():
        versions = (read_json(place / "scored.json") or {}).get("metrics")
        return versions == job.spec["metrics"] and (place / "scores" / "summary.json").is_file()
    made = read_json(place / "generated.json")
    if made is None or made.get("checkpoint") != checkpoint_mark(out, job) or not _all_videos(place, made["videos"]):
        return False
    if job.kind == "generate":
        return True
    scored = read_json(place / "scored.json")
    return scored == score_mark(place, job) and (place / "scores" / "summary.json").is_file()


def lacking(out: Path, jobs: Iterable[Job]) -> set[str]:
    """Ids of the jobs to do: their output is missing, or rests on something that is.

    A training is lacking where something that is needs it: cells that were imported do without.

    Args:
        out: folder of the run.
        jobs: those that others need come first; jobs they need that are not among them count as done.
    """
    ordered = list(jobs)
    found: set[str] = set()
    for job in ordered:
        if job.kind != "train" and (not found.isdisjoint(job.after) or not done(out, job)):
            found.add(job.id)
    needed = {other for job in ordered if job.id in found for other in job.after}
    for job in reversed(ordered):
        if job.kind == "train" and job.id in needed and not done(out, job):
            found.add(job.id)
            needed |= set(job.after)
    return found


def weights_here(out: Path, job: Job) -> bool:
    """Whether the student that a cell samples is in this folder; those of imported cells are not."""
    student = job.spec["checkpoint"]
    return student is None or (out / student / "student.json").is_file()


def training_record(out: Path, cell: str, training: str) -> dict[str, Any] | None:
    """The student.json of a training, from its folder or from the record of an imported cell."""
    student = read_json(out / "train" / training / "checkpoint" / "student.json")
    if student is not None:
        return student
    record = read_json(out / "cells" / cell / RECORD) or {}
    return (record.get("trainings") or {}).get(training)


def checkpoint_mark(out: Path, job: Job) -> str:
    """What tells the weights that a cell was sampled from: the hash of the student's record, or of the base model."""
    student = job.spec["checkpoint"]
    if student is None:
        return str(job.spec["base_hash"])
    return file_mark(out / student / "student.json")


def score_mark(place: Path, job: Job) -> dict[str, str]:
    """What tells the scores that belong to a video set: its manifest and the versions of the metrics."""
    return {"manifest": file_mark(place / "manifest.jsonl"), "metrics": str(job.spec["metrics"])}


def file_mark(path: Path) -> str:
    """SHA-256 of a file, empty where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _all_videos(place: Path, names: int) -> bool:
    try:
        rows = (place / "manifest.jsonl").read_bytes().count(b"\n")
        with os.scandir(place / "videos") as entries:
            there = sum(entry.name.endswith(".mp4") for entry in entries)
    except OSError:
        return False
    return rows >= names and there >= names


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is none or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def log_file(out: Path, job: Job) -> Path:
    """What a job says."""
    return out / "logs" / f"{job.id}.log"


def failed_file(out: Path, job: Job) -> Path:
    """Why a job failed, in one sentence."""
    return out / "logs" / f"{job.id}.failed"


def failure(out: Path, job: Job) -> str | None:
    """Why a job failed in the latest run, None where it did not."""
    return read_note(failed_file(out, job))


def read_note(path: Path) -> str | None:
    """The sentence in a file, None where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


@contextmanager
def job_lock(out: Path, job_id: str) -> Iterator[None]:
    """Hold a job for this process; a worker that outlives a killed run ends within a second, and is waited for."""
    place = out / "logs"
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{job_id}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def running(out: Path, job: Job) -> bool:
    """Whether some process is at work on a job."""
    try:
        with (out / "logs" / f"{job.id}.lock").open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold an experiment's folder.

    Raises:
        ConfigError: another process runs it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another tmd-eval runs the experiment in {out}; see tmd-eval experiment status."
            ) from error
        yield


State = Literal["done", "running", "failed", "blocked", "waiting"]


def states(out: Path, jobs: Mapping[str, Job]) -> dict[str, State]:
    """The state of every job; blocked: a job it needs has failed."""
    found: dict[str, State] = {}
    left = lacking(out, jobs.values())
    for key, job in jobs.items():  # an order in which needed jobs come first
        before = [found[other] for other in job.after if other in found]
        if key not in left:
            found[key] = "done"
        elif failure(out, job) is not None:
            found[key] = "failed"
        elif any(state in ("failed", "blocked") for state in before):
            found[key] = "blocked"
        else:
            found[key] = "running" if running(out, job) else "waiting"
    return found
