"""The choice of settings by trials: every method gets as many, and the best mean rank wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leaderboard.display import lower_is_better
from tmd_eval.experiment.cells import Cell
from tmd_eval.experiment.jobs import DIVERGED, read_json, read_note
from tmd_eval.experiment.schema import Changes, Tuning


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial and how it went."""

    cell: Cell
    metrics: dict[str, float] | None
    """Scores by name; None where it has not run or has diverged."""
    diverged: str | None
    """What was not finite in its training, None where nothing was."""


def read_trials(out: Path, cells: Sequence[Cell]) -> list[Trial]:
    """The trials as they lie in a run's folder."""
    from tmd_eval.micro_scores import METRIC_VERSIONS

    found = []
    for cell in cells:
        folder = out / "cells" / cell.name
        scored = (read_json(folder / "scored.json") or {}).get("metrics") == METRIC_VERSIONS
        summary = read_json(folder / "scores" / "summary.json") if scored else None
        metrics = None if summary is None else {name: float(entry["value"]) for name, entry in summary.items()}
        found.append(Trial(cell=cell, metrics=metrics, diverged=None if metrics else diverged(out, cell)))
    return found


def diverged(out: Path, cell: Cell) -> str | None:
    """What was not finite in a training of a cell, None where nothing was."""
    reasons = (read_note(out / "train" / training.name / DIVERGED) for training in cell.trainings)
    return next((reason for reason in reasons if reason is not None), None)


def choose(tuning: Tuning, trials: Sequence[Trial]) -> dict[str, Changes]:
    """The winner of every method whose trials have all ended; one that diverged loses, one that failed is waited for.

    Args:
        tuning: metrics that rank, and the settings.
        trials: all trials, in the order of the file.
    """
    chosen = {}
    for method, options in tuning.trials.items():
        own = [trial for trial in trials if trial.cell.row.method == method]
        if len(own) < len(options) or any(trial.metrics is None and trial.diverged is None for trial in own):
            continue
        best = best_rank([trial.metrics for trial in own], tuning.metrics)
        if best is not None:
            chosen[method] = options[best]
    return chosen


def best_rank(results: Sequence[dict[str, float] | None], metrics: Sequence[str]) -> int | None:
    """Place of the result with the best mean rank; ties go to the first metric, then to the first place.

    Args:
        results: metrics of each, None for one that diverged.
        metrics: names of those that count, the same weight each; one that no result has does not count.

    Returns:
        The place, None if all diverged.
    """
    alive = [(place, values) for place, values in enumerate(results) if values is not None]
    if not alive:
        return None

    def rank(place_values: dict[str, float], name: str) -> float:
        sign = -1.0 if lower_is_better(name) else 1.0
        worst = float("-inf")
        mine = sign * place_values[name] if name in place_values else worst
        others = [sign * values[name] if name in values else worst for _, values in alive]
        return sum(other > mine for other in others) + 0.5 * (sum(other == mine for other in others) - 1)

    counted = [name for name in metrics if any(name in values for _, values in alive)]

    def key(option: tuple[int, dict[str, float]]) -> tuple[float, float, int]:
        ranks = [rank(option[1], name) for name in counted] or [0.0]
        return sum(ranks) / len(ranks), ranks[0], option[0]

    return min(alive, key=key)[0]
