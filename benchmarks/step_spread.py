"""Spread of a student's clean samples at each of its steps, over the spread of real clips.

    python -m benchmarks.step_spread --ckpt micro --ckpt runs/micro_dmd2v/checkpoint --json spread.json

Distribution matching has one fake score for all steps t_1 .. t_M and does not tell it the step. So what it matches is
the pool of their samples: where early steps stay too flat (less spread than real clips), late ones are pushed beyond
it, which shows as over-saturated videos. At each t_i: real latents are noised to t_i, the student estimates them, and
the root mean square distance of the estimates from the mean real clip is divided by that of the real ones. 1 is right,
below is too flat, above over-saturated. Intervals: 95 %, bootstrap over clips.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from students.base import load_base
from students.checkpoint import load_student
from students.data import DataConfig, open_data
from students.method import interpolate, per_sample
from students.plain import plain_estimate
from students.times import grid
from students.tmd import TMDStudent
from tmd_eval.files import write_json
from tmd_eval.provenance import provenance

Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, text) -> clean sample."""
AT_ONCE = 64


def spread(estimate: Estimate, x: Tensor, text: Tensor, t: float) -> dict[str, float]:
    """Spread of estimates from real latents noised to t, over that of the latents.

    Args:
        estimate: the student's step.
        x: real latents (B, C, T, H, W), B at least 2.
        text: their prompt embeddings (B, text_length, D).
        t: in (0, 1].

    Returns:
        value, low and high.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for part in torch.arange(len(x)).split(AT_ONCE):
        time = torch.full((len(part),), t, dtype=torch.float64)
        noise = torch.randn(x[part].shape, generator=generator)
        with torch.no_grad():
            made.append(estimate(interpolate(x[part], noise, time), time, text[part]))
    center = x.mean(0)
    real, own = ((clips - center).double().pow(2).flatten(1).sum(1).numpy() for clips in (x, torch.cat(made)))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(x), (2000, len(x)))
    low, high = np.quantile(np.sqrt(own[drawn].sum(1) / real[drawn].sum(1)), [0.025, 0.975])
    return {"value": float(np.sqrt(own.sum() / real.sum())), "low": float(low), "high": float(high)}


def open_steps(ref: str, m: int) -> tuple[str, Estimate, Sequence[float]]:
    """A checkpoint's name, its step and its times from noise to data; "micro" is the undistilled teacher at M = m."""
    if not (Path(ref) / "student.json").is_file():
        teacher = load_base(ref).transformer
        return f"{ref} undistilled", lambda x_t, t, text: plain_estimate(teacher, x_t, t, text), _times(m, 10.0)
    spec, network = load_student(Path(ref))
    assert spec.gamma_outer is not None
    times = _times(spec.m, spec.gamma_outer)
    if not isinstance(network, TMDStudent):
        return spec.method, lambda x_t, t, text: plain_estimate(network, x_t, t, text), times
    assert spec.n is not None and spec.gamma_inner is not None
    inner, generator = grid(spec.n, spec.gamma_inner), torch.Generator().manual_seed(1)

    def step(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        y1 = torch.randn(x_t.shape, generator=generator)
        y = network.rollout(network.backbone(x_t, t, text), y1, inner, x_t=x_t, t=t)
        return y if network.target == "x" else x_t - per_sample(t, y).to(y.dtype) * y

    return f"{spec.method}-N{spec.n}H{spec.h}", step, times


def _times(m: int, gamma: float) -> list[float]:
    return [float(t) for t in grid(m, gamma)[1:].flip(0)]


def main() -> None:
    """Measure the checkpoints named and print a table."""
    parser = argparse.ArgumentParser(description="Spread of samples at each step of a student, over that of real clips")
    parser.add_argument("--ckpt", action="append", required=True, help='checkpoint folder, or "micro"; may be repeated')
    parser.add_argument("--m", type=int, default=4, help="steps of an undistilled base model")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = open_data(load_base("micro"), DataConfig(), first=lambda make: make())
    batch = data.draw(0, 1, args.clips, slice(None))
    found: list[dict[str, Any]] = []
    for ref in tqdm(args.ckpt, disable=None, desc="checkpoints"):
        name, estimate, times = open_steps(ref, args.m)
        steps = [{"t": round(t, 4), **spread(estimate, batch.latents, batch.text, t)} for t in times]
        found.append({"name": name, "ckpt": Path(ref).parent.name or ref, "m": len(times), "steps": steps})
        shown = ", ".join(f"t {s['t']}: {s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in steps)
        tqdm.write(f"{name} ({found[-1]['ckpt']}): {shown}")
    if args.json:
        command = shlex.join(["python", "-m", "benchmarks.step_spread", *sys.argv[1:]])
        write_json(args.json, {**provenance(command=command), "clips": args.clips, "checkpoints": found})


if __name__ == "__main__":
    main()
