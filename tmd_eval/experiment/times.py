"""Wall-clock of every finished row, measured apart from the run: one process, the rows in turn, several rounds.

What a run notes beside its videos was measured with as many jobs at once as it had workers, and hours apart. Here every
round samples each row once, so that all rows see the same machine. OUT/times.json holds one entry a row, by the name of
the cell that was sampled.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from students.errors import ConfigError
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.jobs import Job
from tmd_eval.experiment.plan import finished_cells, load, make_plan
from tmd_eval.files import write_json


def read_times(out: Path) -> dict[str, Any]:
    """What :func:`time_rows` wrote; empty where it did not."""
    return store.read_json(out / "times.json") or {}


def time_rows(
    file: Path, out: Path, *, repeats: int = 5, batch: int = 16, told: Callable[[int, int], object] = lambda i, n: None
) -> dict[str, Any]:
    """Sample every finished row in turn, one round to warm up and ``repeats`` more, and write ``times.json``.

    Rows of imported cells, whose weights are not here, are left out.

    Args:
        file: the experiment.
        out: its folder.
        repeats: timed rounds, at least 2.
        batch: videos a round, at least 1; from captions to frames, files not counted.
        told: called after every batch with batches done and batches in all.

    Returns:
        Content of ``times.json``: command, code_revision, device, packages, created; repeats, batch; and cells, by
        name: median, low and high (fastest and slowest round), seconds a video.

    Raises:
        ConfigError: a wrong setting, no finished row, or the experiment is running.
    """
    import torch

    from tmd_eval.generate import Settings, open_model
    from tmd_eval.prompts import load_prompts
    from tmd_eval.provenance import provenance

    if repeats < 2 or batch < 1:
        raise ConfigError(f"Time at least 2 rounds of at least 1 video, not {repeats} of {batch}.")
    with store.run_lock(out):
        loaded = load(file, out)
        plan = make_plan(loaded, out)
        planned = {cell.name: plan.jobs[cell.jobs[-1]] for cell in plan.cells}
        rows: dict[Any, Job] = {}
        for cell in finished_cells(loaded, plan, out):
            if store.weights_here(out, planned[cell.name]):
                rows.setdefault(cell.row, planned[cell.name])
        if not rows:
            raise ConfigError(
                f"{out} holds no finished cell with its weights; run: tmd-eval experiment run {file} --out {out}"
            )
        jobs = {job.name: job for job in rows.values()}
        gpu = torch.cuda.is_available()
        if not gpu:
            torch.set_num_threads(1)  # as in the run
        references = [
            job.spec["base"] if (made := job.spec["checkpoint"]) is None else out / made for job in jobs.values()
        ]
        models = dict(zip(jobs, map(open_model, references), strict=True))
        prompts = load_prompts(loaded.experiment.evaluation.prompts, count=batch).prompts
        seconds: dict[str, list[float]] = defaultdict(list)
        for turn in range(repeats + 1):
            for place, (name, job) in enumerate(jobs.items()):
                settings = {key: job.spec["settings"].get(key) for key in ("m", "n", "guidance", "times")}
                sampling = Settings(**settings).sampling()
                start = time.perf_counter()
                models[name].sample(prompts, range(len(prompts)), **sampling)  # frames on the CPU: the device is done
                if turn:
                    seconds[name].append((time.perf_counter() - start) / len(prompts))
                told(turn * len(jobs) + place + 1, (repeats + 1) * len(jobs))
        times = {
            **provenance(device="cuda" if gpu else "cpu"), "repeats": repeats, "batch": len(prompts),
            "cells": {
                name: {"median": statistics.median(found), "low": min(found), "high": max(found)}
                for name, found in seconds.items()
            },
        }  # fmt: skip
        write_json(out / "times.json", times)
    return times
