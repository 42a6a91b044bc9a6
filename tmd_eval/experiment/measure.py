"""Measured steps: seconds of a training iteration, of a forward pass of the base model, of a video and its scores."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ITERATIONS, WARM = 15, 5
"""Iterations of a measured training, and how many of them come before the clock starts: whole alternations of 5."""
CLIPS = 64
REPEATS = 5


def measure_training(spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Time an iteration of a training by the trainer itself, and a forward pass of its teacher on as many pairs.

    Args:
        spec: the config of the training.
        work: folder for what is thrown away.

    Returns:
        seconds_per_iteration, compute_per_iteration (forwards of the whole model, one pair each: block forwards plus
        twice the backwards over L), forward_seconds (one forward of the teacher on a batch), batch, device.
    """
    import torch

    from students.base import load_base, velocity
    from students.config import resolve
    from students.settings import Layer, flatten
    from students.train import train
    from tmd_eval.provenance import device_name

    config = resolve([Layer("experiment", flatten(spec["config"]))])
    with tempfile.TemporaryDirectory(dir=work) as name:
        short = replace(
            config, out=name, parent=None, iterations=ITERATIONS, log_every=1, save_every=ITERATIONS, keep=1
        )
        train(short, resume=True, progress=False)
        lines = [json.loads(line) for line in (Path(name) / "events.jsonl").read_text("utf-8").splitlines()]
    clock = {line["iteration"]: line["seconds"] for line in lines if "iteration" in line and "seconds" in line}
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    base = load_base(config.base, device=device)
    costs = [config.kind.cost(config.method, i, config.shape(base.blocks)) for i in range(WARM + 1, ITERATIONS + 1)]
    x = torch.randn(config.batch, *base.latent_shape, device=device)
    text = base.encode_prompts([base.negative_prompt]).expand(config.batch, -1, -1)
    t = torch.full((config.batch,), 0.5, dtype=torch.float64, device=device)

    def forward() -> None:
        with torch.no_grad():
            velocity(base.transformer, x, t, text)
        if device == "cuda":
            torch.cuda.synchronize()

    return {
        "preset": spec["preset"],
        "seconds_per_iteration": (clock[ITERATIONS] - clock[WARM]) / (ITERATIONS - WARM),
        "compute_per_iteration": config.batch * sum(cost.total for cost in costs) / len(costs) / base.blocks,
        "forward_seconds": _median_seconds(forward),
        "batch": config.batch,
        "device": device_name(device),
    }


def measure_sampling(spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Time sampling and scoring of the base model, by the commands' own functions.

    Args:
        spec: base model and batch size.
        work: folder for what is thrown away.

    Returns:
        seconds_per_forward (of one video), seconds_fixed (of one video: text, decoding), score_seconds (of one video),
        score_fixed.
    """
    from tmd_eval.generate import generate_run, open_model
    from tmd_eval.micro_scores import score_run
    from tmd_eval.prompts import micro_prompts
    from tmd_eval.video_set import read_manifest

    model = open_model(spec["base"])
    seconds, scoring = {}, {}
    with tempfile.TemporaryDirectory(dir=work) as name:
        for turn, m in (("cold", 1), ("warm", 1), ("warm", 4)):  # batches alike, as small ones are slower by the video
            out = Path(name) / f"{turn}-m{m}"
            generate_run(model, micro_prompts(CLIPS), out, m=m, guidance=1.0, batch_size=spec["batch"])
            seconds[m] = statistics.median(row["seconds"] for row in read_manifest(out))
        for turn in ("cold", "warm"):
            start = time.perf_counter()
            score_run(Path(name) / "warm-m1")
            scoring[turn] = time.perf_counter() - start
    per_forward = max((seconds[4] - seconds[1]) / 3, 1e-6)
    return {
        "seconds_per_forward": per_forward,
        "seconds_fixed": max(seconds[1] - per_forward, 0.0),
        "score_seconds": scoring["warm"] / CLIPS,
        "score_fixed": max(scoring["cold"] - scoring["warm"], 0.0),
    }


def _median_seconds(act: Callable[[], None]) -> float:
    act()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
