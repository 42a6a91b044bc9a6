"""The status of an experiment: as plain values, as text, and as a live table on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job, Plan, State
from tmd_eval.experiment.runner import Progress

SHOWN = 6
"""Failures in the live table, at most."""


def summary(out: Path, plan: Plan, states: Mapping[str, State] | None = None) -> dict[str, Any]:
    """Where an experiment stands.

    Args:
        out: folder of the run.
        plan: its plan.
        states: of the jobs; read from the folder by default.

    Returns:
        cells and jobs by state, sections, failures, and seconds of work left (on one worker), if steps were measured.
    """
    states = store.states(out, plan.jobs) if states is None else states
    cells = [
        {"cell": cell.name, "section": cell.section, "seed": cell.seed, "state": cell_state(plan, cell, states)}
        for cell in plan.cells
    ]
    left = [plan.jobs[key].seconds for key, state in states.items() if state != "done"]
    work = [job for key, job in plan.jobs.items() if states[key] != "done" and job.kind != "measure"]
    known = all(job.seconds is not None for job in work)
    return {
        "out": str(out),
        "file": plan.file,
        "waiting_for_tuning": list(plan.waiting),
        "cells": _count(cell["state"] for cell in cells),
        "jobs": _count(states.values()),
        "sections": {
            name: _count(cell["state"] for cell in cells if cell["section"] == name)
            for name in dict.fromkeys(cell.section for cell in plan.cells)
        },
        "seconds_left": round(sum(s or 0.0 for s in left), 1) if known else None,
        "failures": [
            {
                "job": key,
                "error": store.failure(out, plan.jobs[key]),
                "log": str(store.log_file(out, plan.jobs[key])),
            }
            for key, state in states.items()
            if state == "failed"
        ],
        "cell_states": cells,
    }


def cell_state(plan: Plan, cell: store.PlannedCell, states: Mapping[str, State]) -> State:
    """done where its last job is; else what its jobs say, the worst first."""
    own = [states[key] for key in cell.jobs]
    if plan.waits(cell):
        return "waiting"
    if own[-1] == "done":
        return "done"
    order: tuple[State, ...] = ("failed", "running", "blocked", "waiting")
    return next((state for state in order if state in own), "waiting")


def text(report: Mapping[str, Any]) -> str:
    """The summary as aligned text."""
    lines = []
    width = max([len(name) for name in report["sections"]] + [8])
    for name, counts in report["sections"].items():
        total = sum(counts.values())
        rest = ", ".join(f"{count} {state}" for state, count in counts.items() if state != "done" and count)
        lines.append(f"{name:<{width}}  {counts.get('done', 0):>4} of {total:<4} cells done  {rest}".rstrip())
    lines.append(f"time left on one worker: {duration(report['seconds_left'])}")
    if report["waiting_for_tuning"]:
        lines.append(f"waiting for their tuning: {', '.join(report['waiting_for_tuning'])}")
    for failure in report["failures"]:
        lines.append(f"failed: {failure['job']}: {failure['error']} (log: {failure['log']})")
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(75), duration(7300), duration(12), duration(None)
    ('1 min', '2 h 2 min', '12 s', 'unknown until steps are measured (run --measure)')
    """
    if seconds is None:
        return "unknown until steps are measured (run --measure)"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _count(states: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    return counts


class LiveTable:
    """The live table of a run; where stderr is no terminal, one line for every job that ends."""

    def __init__(self, out: Path, plan: Plan, workers: int):
        """Take what the table is about; the context starts drawing."""
        self.out, self.workers = out, workers
        self.console = Console(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._lines = not self.console.is_terminal
        self.update(plan)

    def update(self, plan: Plan) -> None:
        """Go on with a new plan (after the tuning)."""
        self.plan = plan
        self.states: dict[str, State] = store.states(self.out, plan.jobs)

    def __enter__(self) -> LiveTable:
        if not self._lines:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lines:
            self._live.stop()

    def show(self, progress: Progress, ended: Job | None) -> None:
        """Draw the state of things; the runner calls it."""
        for key in progress.finished:
            self.states[key] = "done"
        for key in progress.failed:
            self.states[key] = "failed"
        for key in progress.blocked:
            self.states[key] = "blocked"
        for key, state in self.states.items():
            if key in progress.running:
                self.states[key] = "running"
            elif state == "running":
                self.states[key] = "waiting"
        if self._lines:
            if ended is not None:
                self._say(progress, ended)
            return
        self._live.update(self._table(progress), refresh=True)

    def _say(self, progress: Progress, ended: Job) -> None:
        count = sum(state == "done" for state in self.states.values())
        what = "failed" if ended.id in progress.failed else "done" if ended.id in progress.finished else "stopped"
        print(f"[{count}/{len(self.states)}] {ended.kind} {ended.name}: {what}", file=sys.stderr, flush=True)

    def _table(self, progress: Progress) -> Group:
        report = summary(self.out, self.plan, self.states)
        table = Table(title=self.plan.title, title_justify="left", expand=False)
        for heading in ("part", "cells done", "of", "failed", "blocked"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for name, counts in report["sections"].items():
            values = (counts.get("done", 0), sum(counts.values()), counts.get("failed", 0), counts.get("blocked", 0))
            table.add_row(name, *map(str, values))
        lines = [Text(f"about {self._left(report['seconds_left'])} left")]
        for key, since in progress.running.items():
            spent = duration(time.monotonic() - since)
            lines.append(Text(f"{key}: {spent} of about {duration(self.plan.jobs[key].seconds)}"))
        for key, sentence in list(progress.failed.items())[-SHOWN:]:
            lines.append(Text(f"failed: {key}: {sentence}"))
        return Group(table, *lines)

    def _left(self, seconds: float | None) -> str:
        return duration(None if seconds is None else seconds / self.workers)
