"""From cells to jobs: measure, train, generate, score, in the order of the file and as far as the tuning is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from students.errors import ConfigError
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.cells import Cell, Resolver
from tmd_eval.experiment.checks import load_experiment
from tmd_eval.experiment.estimate import Estimator
from tmd_eval.experiment.jobs import Job, Plan, PlannedCell
from tmd_eval.experiment.lines import Source
from tmd_eval.experiment.rows import digest
from tmd_eval.experiment.schema import Changes, Experiment
from tmd_eval.experiment.tuning import choose, diverged, read_trials
from tmd_eval.files import write_json

if TYPE_CHECKING:
    from students.base import Base


SAMPLED_BY = ("base.json", "scheduler/scheduler_config.json")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An experiment with everything resolved that can be."""

    experiment: Experiment
    source: Source
    base: Base
    trials: list[Cell]
    """Cells of the tuning."""
    cells: list[Cell]
    """Cells of the matrix; those of waiting methods as they would be with the first trial's settings."""
    tuned: dict[str, Changes]
    """Chosen settings by method; empty without a tuning."""
    waiting: tuple[str, ...]
    """Methods whose tuning is not decided."""


def load(path: Path, out: Path) -> Loaded:
    """Read and check an experiment, all of it, before anything runs.

    Args:
        path: the YAML file.
        out: folder of the run; its finished trials decide the settings of the matrix.

    Raises:
        ConfigError: every mistake of the file at once, each with its line.
        EnvironmentMissingError: the base model's weights are not here.
    """
    experiment, source = load_experiment(path)
    base = _base(experiment, source)
    resolver = Resolver(experiment, source, blocks=base.blocks, base_hash=_identity(base))
    trials = resolver.trials()
    sound = experiment.tuning is not None and not source.problems
    chosen = choose(experiment.tuning, read_trials(out, trials)) if experiment.tuning and sound else {}
    trials_of = experiment.tuning.trials if experiment.tuning else {}
    first = {name: options[0] for name, options in trials_of.items() if options}
    cells = resolver.matrix(first | chosen)
    _check_prompts(experiment, source, max((cell.prompts for cell in (*trials, *cells)), default=1))
    source.check()
    return Loaded(
        experiment=experiment, source=source, base=base, trials=trials, cells=cells,
        tuned=chosen, waiting=tuple(name for name in first if name not in chosen),
    )  # fmt: skip


def _base(experiment: Experiment, source: Source) -> Base:
    from students.base import load_base

    try:
        return load_base(experiment.base)
    except ConfigError as error:
        source.wrong(source.line(("base",)), str(error))
        source.check()
        raise


def _identity(base: Base) -> str:
    """What tells a base model: its weights and, where they can be edited, the files that say how it is sampled."""
    if base.ref == "micro":
        return base.hash
    return digest([base.hash, *(store.file_mark(base.folder / name) for name in SAMPLED_BY)])


def _check_prompts(experiment: Experiment, source: Source, most: int) -> None:
    from tmd_eval.prompts import check_micro

    try:
        check_micro(experiment.evaluation.prompts, most)
    except ConfigError as error:
        source.wrong(source.line(("evaluation", "prompts")), str(error))


def make_plan(loaded: Loaded, out: Path, *, limit: int | None = None, sections: Sequence[str] = ()) -> Plan:
    """The jobs of an experiment; trials that diverged have none, as they would do so again.

    Args:
        loaded: the experiment.
        out: folder of the run, which holds the measured steps and the trials.
        limit: only so many cells of the matrix, in the order of the file.
        sections: only the cells of these; empty: of all.

    Raises:
        ConfigError: the file has no section of such a name.
    """
    names = [section.name for section in loaded.experiment.sections]
    if unknown := [name for name in sections if name not in names]:
        raise ConfigError(f"{loaded.source.path} has no section {unknown[0]!r}; it has: {', '.join(names)}.")
    matrix = [cell for cell in loaded.cells if not sections or set(sections) & set(cell.sections)][:limit]
    needed = {cell.row.method for cell in matrix}
    trials = [cell for cell in loaded.trials if cell.row.method in needed and diverged(out, cell) is None]
    estimator = Estimator(out, loaded.base, [*trials, *matrix])
    jobs: dict[str, Job] = {job.id: job for job in estimator.jobs()}
    cells = []
    for cell in (*trials, *matrix):
        own = [*_training_jobs(cell, loaded), *_cell_jobs(cell, loaded)]
        for job in own:
            jobs.setdefault(job.id, replace(job, seconds=estimator.seconds(job)))
        ids = tuple(job.id for job in own)
        cells.append(
            PlannedCell(name=cell.name, section=cell.sections[0], row=asdict(cell.row), seed=cell.seed, jobs=ids)
        )
    return Plan(
        file=str(loaded.source.path), title=loaded.experiment.title, cells=tuple(cells), jobs=jobs,
        waiting=loaded.waiting,
    )  # fmt: skip


def _training_jobs(cell: Cell, loaded: Loaded) -> list[Job]:
    made: list[Job] = []
    for training in cell.trainings:
        tree = training.config.tree()
        blocks = loaded.base.blocks
        spec = {
            "config": tree,
            "parent": f"train/{made[-1].name}/checkpoint" if made else None,
            "preset": training.preset,
            "compute": training.config.cost(blocks).total / blocks,
        }
        after = (made[-1].id,) if made else ()
        made.append(Job(kind="train", name=training.name, spec=spec, after=after))
    return made


def _cell_jobs(cell: Cell, loaded: Loaded) -> tuple[Job, Job]:
    from tmd_eval.micro_scores import METRIC_VERSIONS

    last = cell.trainings[-1] if cell.trainings else None
    spec = {
        "checkpoint": f"train/{last.name}/checkpoint" if last else None,
        "base": loaded.experiment.base,
        "base_hash": loaded.base.hash,
        "prompts": loaded.experiment.evaluation.prompts,
        "count": cell.prompts,
        "settings": cell.settings,
        "videos": cell.videos,
        "metrics": METRIC_VERSIONS,
        "row": asdict(cell.row),
    }
    after = (f"train-{last.name}",) if last else ()
    generate = Job(kind="generate", name=cell.name, spec=spec, after=after)
    return generate, Job(kind="score", name=cell.name, spec=spec, after=(generate.id,))


def unfinished(out: Path, jobs: Iterable[Job]) -> list[Job]:
    """The jobs whose output is missing or rests on something that is."""
    asked = list(jobs)
    left = store.lacking(out, asked)
    return [job for job in asked if job.id in left]


def finished_cells(loaded: Loaded, plan: Plan, out: Path) -> list[Cell]:
    """Cells of the matrix that are scored, in the order of the file."""
    ends = {cell.name: plan.jobs[cell.jobs[-1]] for cell in plan.cells if not plan.waits(cell)}
    return [cell for cell in loaded.cells if cell.name in ends and store.done(out, ends[cell.name])]


def write_tuning(out: Path, loaded: Loaded) -> None:
    """Write ``tuning.json``: every trial with its scores, and what was chosen."""
    if loaded.experiment.tuning is None:
        return
    trials = [
        {"method": t.cell.row.method, "trial": t.cell.row.trial, "metrics": t.metrics, "diverged": t.diverged}
        for t in read_trials(out, loaded.trials)
    ]
    chosen: Mapping[str, Changes] = loaded.tuned
    settings = {method: {"set": changes.set, "stages": changes.stages} for method, changes in chosen.items()}
    write_json(out / "tuning.json", {"trials": trials, "chosen": settings})
