"""What stage 1 has learned: the inner flow in N steps by average velocities, and by Euler steps, against many steps.

    python -m benchmarks.inner_flow --ckpt runs/micro_tmd_n2h2_stage1/checkpoint --json inner.json

The inner flow of a student is dy/ds = u(y, s, s; m). A map that MeanFlow has taught, y_r = y_s - (s - r) u(y_s, s, r),
ends where that flow ends, in N steps; where it ends no closer than N Euler steps with u(y, s, s), MeanFlow has taught
nothing. Distances are root mean squares over values of y (those of data have 1.4 or so), from real latents noised to
each time of the student's outer grid in turn. Intervals: 95 %, bootstrap over clips.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from students.base import load_base
from students.checkpoint import load_student
from students.data import DataConfig, open_data
from students.errors import ConfigError
from students.method import interpolate
from students.times import HIGH, LOW, grid
from students.tmd import Features, TMDStudent
from tmd_eval.files import write_json
from tmd_eval.provenance import provenance

STEPS = 60
"""Steps of the flow that the others are held against."""


def euler(student: TMDStudent, features: Features, y1: Tensor, times: Tensor) -> Tensor:
    """Where Euler steps with u(y, s, s) end, beside :meth:`TMDStudent.rollout` by average velocities.

    Args:
        student: the student.
        features: of the samples.
        y1: inner noise (B, C, T, H, W).
        times: from 0 to the time of the noise, rising.
    """
    y = y1
    for r, s in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        at = s.expand(len(y1))
        y = y - (s - r).item() * student.average_velocity(y, at, at, features, y1=y1)
    return y


@torch.no_grad()
def distances(student: TMDStudent, x: Tensor, text: Tensor, *, m: int, inner: Tensor, gamma: float) -> dict[str, Any]:
    """Distances of the ends from that of the fine flow.

    Args:
        student: the student, with the target x1 - x.
        x: real latents (B, C, T, H, W).
        text: their prompt embeddings.
        m: M.
        inner: s_0 .. s_N.
        gamma: shift of the outer grid.

    Returns:
        "average" and "euler", each with value, low and high.
    """
    generator = torch.Generator().manual_seed(0)
    t = grid(m, gamma)[1:][torch.arange(len(x)) % m]
    x1, y1 = (torch.randn(x.shape, generator=generator) for _ in range(2))
    features = student.backbone(interpolate(x, x1, t), t, text)
    fine_times = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(20 * LOW, HIGH, STEPS).double()])
    fine = euler(student, features, y1, fine_times)
    draws = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    found = {}
    ends = {"average": student.rollout(features, y1, inner), "euler": euler(student, features, y1, inner)}
    for name, end in ends.items():
        square = (end - fine).double().square().flatten(1).mean(1).numpy()
        low, high = np.quantile(np.sqrt(square[draws].mean(1)), [0.025, 0.975])
        found[name] = {"value": float(np.sqrt(square.mean())), "low": float(low), "high": float(high)}
    return found


def main() -> None:
    """Measure the checkpoints named and print a table."""
    parser = argparse.ArgumentParser(description="N steps of average velocity, and of Euler, against the inner flow")
    parser.add_argument("--ckpt", action="append", required=True, type=Path, help="TMD checkpoint; may be repeated")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = open_data(load_base("micro"), DataConfig(), first=lambda make: make())
    batch = data.draw(5, 1, args.clips, slice(None))
    rows: list[dict[str, Any]] = []
    for folder in tqdm(args.ckpt, disable=None, desc="checkpoints"):
        spec, student = load_student(folder)
        if not isinstance(student, TMDStudent) or student.target != "x1-x":
            raise ConfigError(f"{folder} is no TMD student with the target x1 - x.")
        assert spec.n is not None and spec.gamma_inner is not None and spec.gamma_outer is not None
        inner = grid(spec.n, spec.gamma_inner)
        found = distances(student.eval(), batch.latents, batch.text, m=spec.m, inner=inner, gamma=spec.gamma_outer)
        settings = spec.training.get("config", {})
        rows.append(
            {
                "ckpt": folder.parent.name, "method": spec.method, "m": spec.m, "n": spec.n, "h": spec.h,
                "seed": settings.get("seed"), "iterations": settings.get("iterations"),
                "lr": settings.get("optimiser", {}).get("lr"), "delta": settings.get("method", {}).get("delta"),
                **found,
            }
        )  # fmt: skip
        shown = ", ".join(f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in found.items())
        tqdm.write(f"{folder.parent.name}: {shown}")
    if args.json:
        command = shlex.join(["python", "-m", "benchmarks.inner_flow", *sys.argv[1:]])
        write_json(args.json, {**provenance(command=command), "clips": args.clips, "steps": STEPS, "checkpoints": rows})


if __name__ == "__main__":
    main()
