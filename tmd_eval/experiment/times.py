"""Wall-clock of every finished row, measured apart from the run: one process, the rows in turn, several rounds.

What a run notes beside its videos was measured with as many jobs at once as it had workers, and hours apart. Here every
round samples each row once, so that all rows see the same machine. OUT/times.json holds one entry a row, by the name of
the cell that was sampled. Time goes by a student's shape, not by its weights, so a row whose weights are elsewhere (its
cells were imported) is timed with an untrained student of its shape, and the entry says so.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from students.base import Base
from students.errors import ConfigError
from tmd_eval.experiment import jobs as store
from tmd_eval.experiment.cells import Cell
from tmd_eval.experiment.jobs import Job
from tmd_eval.experiment.plan import finished_cells, load, make_plan
from tmd_eval.experiment.rows import Row
from tmd_eval.files import write_json


def read_times(out: Path) -> dict[str, Any]:
    """What :func:`time_rows` wrote; empty where it did not."""
    return store.read_json(out / "times.json") or {}


def time_rows(
    file: Path, out: Path, *, repeats: int = 5, batch: int = 16, told: Callable[[int, int], object] = lambda i, n: None
) -> dict[str, Any]:
    """Sample every finished row in turn, one round to warm up and ``repeats`` more, and write ``times.json``.

    Args:
        file: the experiment.
        out: its folder.
        repeats: timed rounds, at least 2.
        batch: videos a round, at least 1; from captions to frames, files not counted.
        told: called after every batch with batches done and batches in all.

    Returns:
        Content of ``times.json``: command, code_revision, device, packages, created; repeats, batch; and cells, by
        name: median, low and high (fastest and slowest round), seconds a video; untrained, whether it was a stand-in.

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
        rows: dict[Row, tuple[Cell, Job]] = {}
        for cell in finished_cells(loaded, plan, out):
            job = planned[cell.name]
            known = rows.get(cell.row)
            if known is None or store.weights_here(out, job) > store.weights_here(out, known[1]):
                rows[cell.row] = cell, job
        if not rows:
            raise ConfigError(f"{out} holds no finished cell; run: tmd-eval experiment run {file} --out {out}")
        jobs = {job.name: job for _, job in rows.values()}
        untrained = {job.name for _, job in rows.values() if not store.weights_here(out, job)}
        gpu = torch.cuda.is_available()
        if not gpu:
            torch.set_num_threads(1)  # as in the run
        models = {}
        with TemporaryDirectory() as folder:
            for cell, job in rows.values():
                reference: str | Path = job.spec["base"]
                if job.name in untrained:
                    reference = _stand_in(cell, loaded.base, Path(folder) / job.name)
                elif job.spec["checkpoint"] is not None:
                    reference = out / job.spec["checkpoint"]
                models[job.name] = open_model(reference)
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
                name: {
                    "median": statistics.median(found), "low": min(found), "high": max(found),
                    "untrained": name in untrained,
                }
                for name, found in seconds.items()
            },
        }  # fmt: skip
        write_json(out / "times.json", times)
    return times


def _stand_in(cell: Cell, base: Base, folder: Path) -> Path:
    """A checkpoint of the shape and sampler of a cell's student, before any training."""
    from students.build import new_student, student_spec
    from students.checkpoint import save_student

    config = cell.trainings[-1].config
    save_student(folder, new_student(config, base.transformer), student_spec(config, base, {}))
    return folder
