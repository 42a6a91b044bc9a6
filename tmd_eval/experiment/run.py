"""An experiment from its file to its report: measure, tune, train, sample, score, record."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from students.errors import ConfigError, IncompleteError, TmdError
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job, Plan
from tmd_eval.experiment.plan import Loaded, finished_cells, load, make_plan, unfinished, write_tuning
from tmd_eval.experiment.runner import Progress, Runner, default_workers
from tmd_eval.experiment.table import LiveTable
from tmd_eval.files import write_json


class Interrupted(TmdError):
    """The run was told to stop; its state is saved."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an experiment is run."""

    file: Path
    """The YAML file."""
    out: Path
    """Folder of everything."""
    workers: int | None = None
    """Processes at once; None: one a GPU, or one a core."""
    budget_minutes: float | None = None
    """Stop after so many minutes, with the state saved."""
    limit: int | None = None
    """Only so many cells of the matrix, in the order of the file."""
    sections: tuple[str, ...] = ()
    """Only the cells of these sections; empty: of all."""
    measure: bool = False
    """Only measure steps, for estimates."""
    keep_states: bool = False
    """Keep the training states of finished trainings (optimisers: several times the size of a checkpoint)."""

    def __post_init__(self) -> None:
        for name in ("workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            raise ConfigError(f"budget-minutes must be above 0, not {self.budget_minutes}.")

    @property
    def command(self) -> str:
        """The command that makes the same again."""
        words = ["tmd-eval", "experiment", "run", str(self.file), "--out", str(self.out)]
        words += [word for name in self.sections for word in ("--section", name)]
        return shlex.join([*words, *(["--limit", str(self.limit)] if self.limit else [])])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did."""

    plan: Plan
    progress: Progress
    made: int
    """Jobs done in this run."""
    there: int
    """Jobs that were done before."""
    left: tuple[Job, ...]
    """Jobs that it was to do and that are not done."""
    report: Path | None
    """Path of index.html, if any cell is there to report."""


def plan_of(options: Options, loaded: Loaded) -> Plan:
    """The jobs of the cells that the options ask for."""
    return make_plan(loaded, options.out, limit=options.limit, sections=options.sections)


def run(options: Options) -> Outcome:
    """Do what is missing of an experiment and write its report.

    Raises:
        ConfigError: the file is wrong, all mistakes at once; or the folder belongs to a run in progress.
        IncompleteError: jobs failed or the time was up; what is done stays, and the report says what is missing.
        Interrupted: told to stop; the state is saved.
    """
    start = time.monotonic()
    out = options.out
    with store.run_lock(out):
        loaded = load(options.file, out)
        plan = plan_of(options, loaded)
        for job in plan.jobs.values():  # a new run tries again what failed in the last one
            store.failed_file(out, job).unlink(missing_ok=True)
        store.save_plan(out, plan)
        write_tuning(out, loaded)
        ours, gpus = default_workers()
        workers = options.workers or ours
        deadline = None if options.budget_minutes is None else start + 60 * options.budget_minutes
        with LiveTable(out, plan, workers) as table, Runner(
            out, command=options.command, workers=workers, gpus=gpus, deadline=deadline, show=table.show
        ) as runner:  # fmt: skip
            loaded, plan = _phases(options, runner, table, loaded, plan)
        progress = runner.progress
        if options.measure:
            report = None
        else:
            whole = make_plan(loaded, out)  # a report shows all that is there, whichever part was asked for
            _record(out, loaded, whole)
            report = _report(options, loaded, whole)
        work = work_of(options, plan)
        left = tuple(unfinished(out, work))
    there = len({job.id for job in work} - {job.id for job in left} - set(progress.finished))
    outcome = Outcome(plan=plan, progress=progress, made=len(progress.finished), there=there, left=left, report=report)
    _complain(options, outcome)
    return outcome


def work_of(options: Options, plan: Plan) -> list[Job]:
    """The jobs that a run must get done; measured steps only help to estimate, unless they are what it is for."""
    return [job for job in plan.jobs.values() if (job.kind == "measure") == options.measure]


def _phases(
    options: Options, runner: Runner, table: LiveTable, loaded: Loaded, plan: Plan
) -> tuple[Loaded, Plan]:  # fmt: skip
    """Measure; run the trials; with the chosen settings, run the matrix."""
    out = options.out
    lacking = unfinished(out, plan.allowed.values())
    if any(job.kind != "measure" for job in lacking) or options.measure:
        measures = [job for job in lacking if job.kind == "measure"]
        if measures:
            runner.run(measures)
            plan = plan_of(options, loaded)
            store.save_plan(out, plan)
            table.update(plan)
    if options.measure or runner.progress.stopped:
        return loaded, plan
    if plan.waiting:
        trials = {key for cell in plan.cells if cell.row["trial"] is not None for key in cell.jobs}
        jobs = [plan.jobs[key] for key in plan.jobs if key in trials]
        runner.run(unfinished(out, jobs), done=lambda job: _tidy(options, job))
        if runner.progress.stopped:
            return loaded, plan
        loaded = load(options.file, out)
        write_tuning(out, loaded)
        plan = plan_of(options, loaded)
        store.save_plan(out, plan)
        table.update(plan)
    lost = {*runner.progress.failed, *runner.progress.blocked}  # a later run tries them again, this one does not
    jobs = [job for job in plan.allowed.values() if job.kind != "measure" and job.id not in lost]
    runner.run(unfinished(out, jobs), done=lambda job: _tidy(options, job))
    return loaded, plan


def _tidy(options: Options, job: Job) -> None:
    """Training states serve to resume; a finished training needs them no more."""
    if job.kind == "train" and not options.keep_states:
        shutil.rmtree(store.folder(options.out, job) / "state", ignore_errors=True)


def _record(out: Path, loaded: Loaded, plan: Plan) -> None:
    """Put finished cells of the matrix into the run's database."""
    from tqdm import tqdm

    from leaderboard.record import record_run
    from tmd_eval.experiment.names import row_name

    database = out / "tmd-eval.db"
    fresh = not database.is_file()
    first = {cell.name: cell for cell in reversed(loaded.cells)}  # two budgets may come to one cell
    left = []
    for planned in plan.cells:
        score = plan.jobs[planned.jobs[-1]]
        if planned.name not in first or plan.waits(planned) or not store.done(out, score):
            continue
        folder = store.folder(out, score)
        mark = store.score_mark(folder, score)
        if fresh or store.read_json(folder / "recorded.json") != mark:
            left.append((planned, folder, mark))
    for planned, folder, mark in tqdm(left, desc="recording", unit="cell", delay=2):
        name = f"{row_name(loaded.experiment, first[planned.name].row)}, seed {planned.seed}"
        record_run(f"sqlite:///{database}", folder, name=name)
        write_json(folder / "recorded.json", mark)


def write_report(options: Options, folder: Path | None = None) -> Path:
    """Write the report of what is done so far.

    Args:
        options: the experiment.
        folder: report folder; None for ``report/`` in the run's.

    Returns:
        Path of index.html.

    Raises:
        ConfigError: the file is wrong, or nothing is done yet.
    """
    from tmd_eval.experiment.collect import collect, write

    loaded = load(options.file, options.out)
    plan = make_plan(loaded, options.out)
    content = collect(loaded, plan, options.out, command=options.command)
    if not content.rows:
        raise ConfigError(f"{options.out} holds no finished cell yet; run: {options.command}")
    page = write(content, folder or options.out / "report")
    _record_claims(options, page)
    return page


def _record_claims(options: Options, page: Path) -> None:
    """Put the report's claims into the run's database, in place of those of an older report."""
    from leaderboard.record import record_claims

    record_claims(f"sqlite:///{options.out / 'tmd-eval.db'}", page.parent, name=options.file.stem)


def _report(options: Options, loaded: Loaded, plan: Plan) -> Path | None:
    """Write the report, unless the one that is there shows the same."""
    from tmd_eval.experiment.collect import collect, state, write

    page = options.out / "report" / "index.html"
    old = store.read_json(page.parent / "report.json")
    now = state(loaded, plan, options.out, finished_cells(loaded, plan, options.out))
    if page.is_file() and old and old.get("experiment", {}).get("state") == now:
        return page
    content = collect(loaded, plan, options.out, command=options.command)
    if not content.rows:
        return None
    print("writing the report", file=sys.stderr)
    page = write(content, options.out / "report")
    _record_claims(options, page)
    return page


def _complain(options: Options, outcome: Outcome) -> None:
    """Leave with exit code 3 or 130 where something is missing."""
    progress, plan, out = outcome.progress, outcome.plan, options.out
    if progress.stopped == "interrupted":
        raise Interrupted(f"interrupted, the state is saved; go on with: {options.command}")
    failed = [
        f"failed: {key}: {sentence} (log: {store.log_file(out, plan.jobs[key])})"
        for key, sentence in progress.failed.items()
        if key in plan.jobs  # not a trial that diverged: it has lost, and nothing is missing
    ]
    if not outcome.left:
        print("\n".join(failed), end="\n" if failed else "", file=sys.stderr)  # steps that were to be measured
        return
    lines = [f"{len(outcome.left)} of {len(plan.jobs)} jobs are not done; go on with: {options.command}"]
    if progress.stopped == "budget":
        lines[0] = f"the {options.budget_minutes:g} minutes are over, the state is saved; {lines[0]}"
    trials = {cell.row["method"] for cell in plan.cells if cell.row["trial"] is not None}
    lines += [f"every trial of {name} diverged; give it others." for name in plan.waiting if name not in trials]
    raise IncompleteError("\n".join([*lines, *failed]))


def outcome_json(outcome: Outcome, out: Path) -> str:
    """What ``--json`` prints after a run."""
    report = store.read_json(out / "report" / "report.json") if outcome.report else None
    return json.dumps(
        {
            "out": str(out),
            "cells": len(outcome.plan.cells),
            "jobs": len(outcome.plan.jobs),
            "made": outcome.made,
            "report": None if outcome.report is None else str(outcome.report),
            "claims": [] if report is None else report["claims"],
        }
    )
