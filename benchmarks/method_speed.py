"""Step time of each method as a multiple of one teacher forward, beside what counting blocks predicts.

    python -m benchmarks.method_speed --size micro --size mid --json reports/benchmarks/method_speed.json

One row a method and kind of turn. "measured": losses, backward and optimiser step over one forward of the teacher, the
median of interleaved rounds; on the CPU in processor time of one thread, which other load disturbs little.
"predicted": block forwards plus twice the block backwards (:class:`students.method.Cost`) over L. Not predicted are the
optimiser (its share is given), the discriminator, embeddings, and that a forward-mode derivative runs plain attention.
"backward_over_forward" is what a backward really costs here, measured on a whole transformer; 2 is assumed.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.student_speed import SIZES, transformer
from students.base import velocity
from students.dmd2v import PlainDMD2VConfig
from students.kd import KDConfig, Trajectories
from students.method import Batch, Method, Shape
from students.rcm import RCMConfig
from students.registry import kind_name, method_kind
from students.times import grid
from students.tm_mf import TMMFConfig
from students.tmd import TMDStudent
from students.tmd_stage2 import Stage2Config
from tmd_eval.provenance import provenance

GUIDANCE = 1.5
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "TM-MF": (TMMFConfig(guidance=GUIDANCE), {"student": 1}),
    "TMD stage 2": (Stage2Config(guidance=GUIDANCE), {"student": 5, "critics": 1}),
    "TMD stage 2, no GAN": (Stage2Config(guidance=GUIDANCE, discriminator="none"), {"student": 5, "critics": 1}),
    "DMD2-v": (PlainDMD2VConfig(guidance=GUIDANCE), {"student": 5, "critics": 1}),
    "DMD2-v, no GAN": (PlainDMD2VConfig(guidance=GUIDANCE, discriminator="none"), {"student": 5, "critics": 1}),
    "KD": (KDConfig(), {"student": 1}),
    "rCM": (RCMConfig(guidance=GUIDANCE, tangent_warmup=1), {"warm-up": 1, "student": 6, "critic": 2}),
    "rCM, finite difference": (
        RCMConfig(guidance=GUIDANCE, tangent_warmup=1, derivative="finite"), {"warm-up": 1},
    ),
    "rCM, discrete": (RCMConfig(guidance=GUIDANCE, tangent_warmup=1, consistency="dcm"), {"warm-up": 1}),
}  # fmt: skip
"""Method, settings, and an iteration of each kind of turn."""


def seconds(call: Callable[[], object]) -> float:
    """Time of one call: wall-clock on a GPU, processor time on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass
class Bench:
    """A teacher of some size, and one batch for it."""

    teacher: Any
    batch: Trajectories
    negative: torch.Tensor
    h: int

    @classmethod
    def of(cls, size: dict[str, Any], device: str) -> Bench:
        """Random weights and data."""
        teacher = transformer(size).requires_grad_(False).to(device)
        shape = (size["batch"], size["channels"], *size["latent"])
        text = torch.randn(size["batch"], size["text"], 64, device=device)
        latents = torch.randn(shape, device=device)
        batch = Trajectories(
            latents=latents, text=text, points=torch.randn(shape[0], 1, *shape[1:]), times=grid(1, 10.0)[1:]
        )
        return cls(teacher, batch, text[:1], max(round(size["blocks"] / 6), 1))

    def forward(self) -> None:
        """One forward of the teacher."""
        with torch.no_grad():
            t = torch.full((len(self.batch.latents),), 0.9, dtype=torch.float64, device=self.batch.latents.device)
            velocity(self.teacher, self.batch.latents, t, self.batch.text)

    def method(self, config: Any) -> Method:
        """The method of some settings, ready to step."""
        kind = method_kind(kind_name(config))
        student: nn.Module = transformer_copy(self.teacher)
        if kind.flow_head:
            student = TMDStudent.from_teacher(self.teacher, h=self.h)
        method = kind.build(student.to(self.batch.latents.device), self.teacher, self.negative, config)
        for network in method.networks.values():
            network.to(self.batch.latents.device).train()
        return method


def transformer_copy(teacher: nn.Module) -> nn.Module:
    """A trainable copy."""
    return copy.deepcopy(teacher).requires_grad_(True)


def row(bench: Bench, config: Any, iteration: int, rounds: int) -> dict[str, Any]:
    """One kind of turn of one method."""
    method, blocks = bench.method(config), len(bench.teacher.blocks)
    optimisers = [torch.optim.AdamW(method.networks[name].parameters(), lr=1e-6) for name in method.turn(iteration)]

    def work() -> None:
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        batch: Batch = bench.batch
        terms = method.losses(batch, iteration, torch.Generator().manual_seed(0))
        torch.stack([term.double() for term in terms.values()]).sum().backward()

    def update() -> None:
        for optimiser in optimisers:
            optimiser.step()

    work(), update(), bench.forward()
    found = [(seconds(work), seconds(update), seconds(bench.forward)) for _ in range(rounds)]
    ratios = [(a + b) / c for a, b, c in found]
    kind = method_kind(kind_name(config))
    cost = kind.cost(config, iteration, Shape(blocks, bench.h if kind.flow_head else None))
    measured = statistics.median(ratios)
    return {
        "forwards": cost.forwards / blocks, "backwards": cost.backwards / blocks, "predicted": cost.total / blocks,
        "measured": measured, "low": min(ratios), "high": max(ratios), "rounds": rounds,
        "over_predicted": measured / (cost.total / blocks),
        "optimiser": statistics.median(b / c for _, b, c in found),
        "teacher_forward_seconds": statistics.median(c for *_, c in found),
    }  # fmt: skip


def backward_over_forward(bench: Bench, rounds: int) -> float:
    """Time of a backward through a whole trainable transformer over that of its forward."""
    student: Any = transformer_copy(bench.teacher)
    t = torch.full((len(bench.batch.latents),), 0.9, dtype=torch.float64, device=bench.batch.latents.device)
    found = []
    for _ in range(rounds + 1):
        outputs: list[torch.Tensor] = []
        forward = seconds(lambda: outputs.append(velocity(student, bench.batch.latents, t, bench.batch.text)))  # noqa: B023
        found.append(seconds(lambda: outputs[0].square().mean().backward()) / forward)  # noqa: B023
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "benchmarks.method_speed", *sys.argv[1:]])
    result: dict[str, Any] = {**provenance(command=command, device=device), "sizes": {}}
    for name in args.size or sorted(SIZES):
        bench = Bench.of(SIZES[name], device)
        rows = []
        for method, (config, turns) in CASES.items():
            for turn, iteration in turns.items():
                rows.append({"method": method, "turn": turn, **row(bench, config, iteration, args.rounds)})
                print(
                    "{size:6} {method:24} {turn:8} predicted {predicted:6.2f} measured {measured:6.2f} "
                    "({over_predicted:.2f}), optimiser {optimiser:.2f}".format(size=name, **rows[-1]),
                    flush=True,
                )
        result["sizes"][name] = {
            "h": bench.h, "backward_over_forward": backward_over_forward(bench, args.rounds), "rows": rows,
        }  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
