"""From a run's folder to the content of its report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from leaderboard.display import phrase
from leaderboard.effects import Scores
from leaderboard.matrix import Matrix, MatrixClaim, MatrixRow, StepTime, Trials
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.budget import student_updates
from tmd_eval.experiment.cells import Cell
from tmd_eval.experiment.jobs import Job, Plan
from tmd_eval.experiment.names import budget_name, role, row_name
from tmd_eval.experiment.plan import Loaded, finished_cells
from tmd_eval.experiment.rows import Row, digest, find
from tmd_eval.experiment.schema import BASE, Changes
from tmd_eval.experiment.times import read_times
from tmd_eval.experiment.tuning import read_trials


def collect(loaded: Loaded, plan: Plan, out: Path, *, command: str) -> Matrix:
    """Read every finished cell of a run.

    Args:
        loaded: the experiment.
        plan: its plan; only the cells in it are reported.
        out: folder of the run.
        command: command line that makes the report again.
    """
    experiment = loaded.experiment
    planned = {cell.name: cell for cell in plan.cells if not plan.waits(cell)}
    cells = [cell for cell in loaded.cells if cell.name in planned]
    finished = finished_cells(loaded, plan, out)
    times = read_times(out)
    groups: dict[Row, list[Cell]] = {}
    for cell in finished:
        groups.setdefault(cell.row, []).append(cell)
    asked: dict[Row, int] = {}
    for cell in cells:
        asked[cell.row] = asked.get(cell.row, 0) + 1
    reading = tqdm(groups.items(), desc="reading scores", unit="row", delay=2)
    rows = tuple(_row(loaded, out, group, asked[row], times) for row, group in reading)
    configs = [_yaml(run / "config.yaml") for row in rows for run in row.runs]
    matrix = Matrix(
        title=experiment.title,
        command=command,
        experiment={
            "file": str(loaded.source.path),
            "sha256": store.file_mark(loaded.source.path),
            "state": state(loaded, plan, out, finished),
        },
        code_revision=", ".join(sorted({str(config.get("code_revision")) for config in configs})),
        device=", ".join(sorted({str(config.get("device")) for config in configs})),
        packages=_packages(configs),
        rows=rows,
        claims=_claims(loaded),
        sections=tuple(section.name for section in experiment.sections),
        budgets=tuple(budget_name(experiment, name) for name in experiment.budgets),
        headline=experiment.evaluation.metric,
        prompts=_prompts(loaded),
        timing=_timing(times),
        tuning=_protocol(loaded),
        ranked_by=tuple(experiment.tuning.metrics) if experiment.tuning else (),
        trials=_trials(loaded, out),
        steps=_steps(out, plan),
        missing=tuple(_missing(plan, out, planned.values(), {cell.name for cell in finished})),
        notes=experiment.notes,
        pooled=experiment.pool_seeds,
        imported=sum((out / "cells" / cell.name / store.RECORD).is_file() for cell in finished),
    )
    return replace(matrix, rows=tuple(replace(row, pools=matrix.pools) for row in rows))


def state(loaded: Loaded, plan: Plan, out: Path, finished: Sequence[Cell]) -> str:
    """What tells everything that a report shows: the file, scores, failures and times."""
    scored = [store.read_json(out / "cells" / cell.name / "scored.json") for cell in finished]
    failures = [store.failure(out, job) for job in plan.jobs.values()]
    steps = [store.file_mark(store.folder(out, job)) for job in plan.jobs.values() if job.kind == "measure"]
    cells = [cell.name for cell in plan.cells]
    return digest([store.file_mark(loaded.source.path), cells, scored, failures, steps, read_times(out)])


def write(matrix: Matrix, folder: Path) -> Path:
    """Write the report folder; the path of its index.html."""
    from leaderboard.matrix_report import build_matrix_report

    return build_matrix_report(matrix, folder)


def _packages(configs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Versions that the cells were made with; several of one package where machines differed."""
    found: dict[str, set[str]] = {}
    for config in configs:
        for name, version in config.get("packages", {}).items():
            found.setdefault(name, set()).add(str(version))
    return {name: " or ".join(sorted(versions)) for name, versions in sorted(found.items())}


def _row(loaded: Loaded, out: Path, cells: Sequence[Cell], planned: int, times: Mapping[str, Any]) -> MatrixRow:
    experiment, row = loaded.experiment, cells[0].row
    runs = tuple(out / "cells" / cell.name for cell in cells)
    configs = [_yaml(run / "config.yaml") for run in runs]
    checkpoints = [config.get("checkpoint", {}) for config in configs]
    checkpoint, weights = checkpoints[0], tuple(str(found.get("hash")) for found in checkpoints)
    summaries = [store.read_json(run / "scores" / "summary.json") or {} for run in runs]
    names = set.intersection(*(set(summary) for summary in summaries))
    trained = row.method != BASE
    timed = next((times["cells"][cell.name] for cell in cells if cell.name in times.get("cells", {})), None)
    if timed is None:
        noted = [row["seconds"] for run in runs for row in _lines(run / "manifest.jsonl") if row.get("seconds")]
        timed = {"median": statistics.median(noted) if noted else None}
    trainings = cells[0].trainings
    label = experiment.ablations[row.ablation].label if row.ablation else None
    return MatrixRow(
        key=row.key,
        name=row_name(experiment, row, budget=False),
        sections=cells[0].sections,
        budget=None if row.budget is None else budget_name(experiment, row.budget),
        role=role(row),
        method=str(checkpoint.get("method")),
        m=row.m,
        n=checkpoint.get("n"),
        h=checkpoint.get("h"),
        ablation=label,
        baseline=replace(row, ablation=None).key if row.ablation else None,
        effective_nfe=checkpoint.get("effective_nfe"),
        forward_passes=checkpoint.get("forward_passes"),
        seconds_per_video=timed["median"],
        seconds_range=(timed["low"], timed["high"]) if "low" in timed else None,
        training_minutes=_minutes(out, cells) if trained else None,
        compute=sum(t.config.cost(loaded.base.blocks).total for t in trainings) / loaded.base.blocks
        if trained
        else None,
        student_updates=student_updates(trainings[-1].config) if trained else None,
        iterations=tuple(training.config.iterations for training in trainings),
        seeds=tuple(cell.seed for cell in cells),
        planned_seeds=planned,
        videos=sum(cell.videos for cell in cells),
        scores={name: _scores(name, runs, summaries, cells, weights) for name in names},
        counts={name: sum(int(summary[name]["n"]) for summary in summaries) for name in names},
        runs=runs,
        weights=weights,
        devices=tuple(str(config.get("device")) for config in configs),
        blocks=loaded.base.blocks,
    )


def _scores(
    name: str,
    runs: Sequence[Path],
    summaries: Sequence[dict[str, Any]],
    cells: Sequence[Cell],
    weights: tuple[str, ...],
) -> Scores:
    entries, row = [summary[name] for summary in summaries], cells[0].row
    trained = row.method != BASE
    return Scores(
        values=np.array([entry["value"] for entry in entries]),
        ranges=np.array([[entry["low"], entry["high"]] for entry in entries]),
        prompts=_prompt_table(name, runs),
        trained=trained,
        students=weights if trained else (),
        # Trainings draw from (seed, iteration), so these start with the same data, times and noise; what an ablation
        # draws otherwise parts them later, and how far they stay alike is estimated (leaderboard/effects.py).
        family=f"{row.method} M = {row.m}, {row.budget}" if trained else "",
        numbers=tuple(cell.seed for cell in cells),
    )


def _prompt_table(name: str, runs: Sequence[Path]) -> np.ndarray | None:
    """Means over the videos of each prompt, (S, P), prompts in alphabetical order; None for metrics of a whole set."""
    tables = []
    for run in runs:
        path = run / "scores" / f"{name}.jsonl"
        if not path.is_file():
            return None
        values: dict[str, list[float]] = {}
        for row in _lines(path):
            values.setdefault(str(row["extra"]["prompt"]), []).append(float(row["value"]))
        tables.append({prompt: float(np.mean(found)) for prompt, found in values.items()})
    prompts = sorted(tables[0])
    if any(sorted(table) != prompts for table in tables):
        return None
    return np.array([[table[prompt] for prompt in prompts] for table in tables])


def _minutes(out: Path, cells: Sequence[Cell]) -> float | None:
    """Training of all stages, a mean over seeds; every row counts the stages it shares in full."""
    totals = []
    for cell in cells:
        seconds = 0.0
        for training in cell.trainings:
            record = store.training_record(out, cell.name, training.name)
            if record is None:
                return None
            training_record = record["training"]
            if training.config.kind.setup_cost is not None and "setup_seconds" not in training_record:
                return None  # an older run, which did not time what it made first
            seconds += float(training_record.get("seconds", 0.0)) + float(training_record.get("setup_seconds", 0.0))
        totals.append(seconds / 60)
    return statistics.mean(totals)


def _claims(loaded: Loaded) -> tuple[MatrixClaim, ...]:
    experiment = loaded.experiment
    rows = dict.fromkeys(cell.row for cell in loaded.cells)
    found = []
    for claim in experiment.claims:
        a, b = find(claim.a, rows, experiment), find(claim.b, rows, experiment)
        found.append(
            MatrixClaim(
                claim=claim.claim, source=claim.source, metric=claim.metric, direction=claim.direction,
                margin=claim.margin, a=a.key, b=b.key,
                names=(row_name(experiment, a), row_name(experiment, b)), note=claim.note,
            )
        )  # fmt: skip
    return tuple(found)


def _prompts(loaded: Loaded) -> str:
    evaluation = loaded.experiment.evaluation
    kind = "held-out prompts" if evaluation.prompts == "micro" else "prompts"
    return (
        f"{evaluation.num_prompts} {kind} ({evaluation.prompts}), {evaluation.samples_per_prompt} "
        f"video{'s' if evaluation.samples_per_prompt != 1 else ''} each, for every seed"
    )


def _timing(times: Mapping[str, Any]) -> str:
    """How seconds a video were measured, in words."""
    stand_ins = any(cell.get("untrained") for cell in times.get("cells", {}).values())
    apart = (
        f"measured apart from the run, on {times['device']}: one process, every row in turn, {times['repeats']} rounds "
        f"of {times['batch']} videos; median [fastest, slowest] round. "
        + ("Where a row's weights lie elsewhere, an untrained student of its shape was timed. " if stand_ins else "")
        if times
        else ""
    )
    rest = "Rows without a range: the median" if times else "the median"
    return (
        f"{apart}{rest} over the videos of the run itself, which had other jobs beside; compare those by effective NFE."
    )


def _protocol(loaded: Loaded) -> str:
    tuning = loaded.experiment.tuning
    from tmd_eval.micro_scores import MIN_FRECHET

    if tuning is None:
        return "Nothing was tuned: every method has the settings of its preset."
    count = len(next(iter(tuning.trials.values())))
    ranked = [name for name in tuning.metrics if tuning.num_prompts >= MIN_FRECHET or not name.startswith("frechet")]
    return (
        f"Every method got {count} trials at M = {tuning.m}, one training each with seed {tuning.seed}, scored on "
        f"{tuning.num_prompts} held-out prompts that no row of the tables is scored on. The best mean rank in "
        f"{' and '.join(map(phrase, ranked))} was chosen and used for all M, N, H, seeds and budgets of the "
        "method."
    )


def _trials(loaded: Loaded, out: Path) -> tuple[Trials, ...]:
    tuning = loaded.experiment.tuning
    if tuning is None:
        return ()
    found, done = [], read_trials(out, loaded.trials)
    for method, options in tuning.trials.items():
        own = {trial.cell.row.trial: trial for trial in done if trial.cell.row.method == method}
        rows = []
        for number, changes in enumerate(options):
            trial = own.get(number)
            rows.append((_settings(changes), trial.metrics if trial else None, loaded.tuned.get(method) is changes))
        found.append(Trials(method=loaded.experiment.methods[method].label, rows=tuple(rows)))
    return tuple(found)


def _settings(changes: Changes) -> str:
    """Such as "stage2: guidance 1.25, lr 0.0003"; the sections of the settings go without saying."""

    def words(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in settings.items())

    parts = [words(changes.set)] if changes.set else []
    parts += [f"{stage}: {words(settings)}" for stage, settings in changes.stages.items() if settings]
    return "; ".join(parts) or "as the preset"


def _steps(out: Path, plan: Plan) -> tuple[StepTime, ...]:
    found = []
    for job in plan.jobs.values():
        measured = store.read_json(store.folder(out, job)) if _is_step(job) else None
        if measured is not None:
            forward = measured["forward_seconds"]
            found.append(
                StepTime(
                    name=Path(measured["preset"]).stem,
                    seconds=measured["seconds_per_iteration"],
                    measured=measured["seconds_per_iteration"] / forward,
                    counted=measured["compute_per_iteration"] / measured["batch"],
                    device=measured["device"],
                )
            )
    return tuple(found)


def _is_step(job: Job) -> bool:
    return job.kind == "measure" and job.spec["what"] == "training"


def _missing(
    plan: Plan, out: Path, planned: Iterable[store.PlannedCell], finished: set[str]
) -> Iterable[str]:  # fmt: skip
    for cell in plan.cells:
        if plan.waits(cell):
            yield f"{cell.row['method']} waits for its tuning: {cell.name}."
    for cell in planned:
        if cell.row["trial"] is not None or cell.name in finished:
            continue
        reasons = [f"{key}: {why}" for key in cell.jobs if (why := store.failure(out, plan.jobs[key])) is not None]
        yield f"{cell.name} is not there" + (f"; {reasons[0]}" if reasons else ".")


def _yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
