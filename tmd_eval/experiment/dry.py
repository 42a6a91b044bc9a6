"""What an experiment would do and how long it would take; writes nothing."""

from __future__ import annotations

from typing import Any

from tmd_eval.experiment.plan import load, unfinished
from tmd_eval.experiment.run import Options, plan_of
from tmd_eval.experiment.runner import default_workers
from tmd_eval.experiment.table import duration


def dry_run(options: Options) -> dict[str, Any]:
    """Describe a run.

    Returns:
        cells, jobs to do by kind, seconds of work by section and in all, and the same as text.

    Raises:
        ConfigError: the file is wrong, all mistakes at once.
    """
    loaded = load(options.file, options.out)
    plan = plan_of(options, loaded)
    left = {job.id: job for job in unfinished(options.out, plan.jobs.values())}
    workers = options.workers or default_workers()[0]
    kinds = {kind: sum(job.kind == kind for job in left.values()) for kind in ("measure", "train", "generate", "score")}
    sections: dict[str, dict[str, Any]] = {}
    counted: set[str] = set()
    for cell in plan.cells:
        part = sections.setdefault(cell.section, {"cells": 0, "jobs": 0, "seconds": 0.0})
        own = [left[key] for key in cell.jobs if key in left and key not in counted]
        counted |= {job.id for job in own}
        part["cells"] += bool(own)
        part["jobs"] += len(own)
        known = part["seconds"] is not None and all(job.seconds is not None for job in own)
        part["seconds"] = part["seconds"] + sum(job.seconds or 0.0 for job in own) if known else None
    known = all(part["seconds"] is not None for part in sections.values())
    seconds = sum(part["seconds"] for part in sections.values()) if known else None
    lines = [
        f"{name}: {part['cells']} cells, {part['jobs']} jobs, {_spent(part['seconds'])}"
        for name, part in sections.items()
    ]
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines.append(f"jobs: {shown}; {workers} at once")
    if known and seconds is not None:
        lines.append(f"about {duration(seconds / workers)} in all, by steps measured here before")
    else:
        lines.append(
            "no steps are measured here yet, so there is no estimate of time; measure them with: "
            f"tmd-eval experiment run {options.file} --out {options.out} --measure"
        )
    if plan.waiting:
        lines.append(f"settings of {', '.join(plan.waiting)} will come from the tuning")
    return {
        "out": str(options.out),
        "cells": len(plan.cells),
        "jobs": kinds,
        "workers": workers,
        "sections": sections,
        "seconds": None if seconds is None else round(seconds / workers, 1),
        "waiting_for_tuning": list(plan.waiting),
        "text": "\n".join(lines),
    }


def _spent(seconds: float | None) -> str:
    return "time unknown" if seconds is None else f"{duration(seconds)} of work"
