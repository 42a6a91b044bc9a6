"""What a TMD student costs: sampling against Eq. 16, and what the rollout adds to a stage 2 update.

    python -m benchmarks.student_speed --size micro --size mid --json reports/benchmarks/student_speed.json

Sampling: wall-clock of one student sample over (effective NFE x one teacher forward), the median ratio of interleaved
rounds, so that both sides see the same machine. Random weights, one thread on the CPU. Training: forward, backward and
optimiser step of the student's turn of stage 2 at N = 2, H / L = 1/6, over the same turn with one head call (N = 1);
the paper reports under 17 % more at 30 blocks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from students.base import velocity
from students.method import Batch
from students.nfe import effective_nfe
from students.sampling import sample_tmd
from students.times import grid
from students.tmd import TMDStudent
from students.tmd_stage2 import Stage2Config, TMDStage2
from tmd_eval.provenance import provenance

MICRO = {"blocks": 10, "heads": 4, "head": 32, "ffn": 384, "channels": 8, "latent": (3, 8, 8), "text": 16, "batch": 8}
MID = {"blocks": 12, "heads": 6, "head": 64, "ffn": 1536, "channels": 16, "latent": (8, 32, 32), "text": 32, "batch": 1}
SIZES: dict[str, dict[str, Any]] = {"micro": MICRO, "mid": MID}
SETTINGS = ((1, 2, 2), (1, 4, 2), (2, 2, 2))  # (M, N, H)


def transformer(size: dict[str, Any]) -> WanTransformer3DModel:
    """A Wan transformer of random weights; 2,048 tokens at mid size, 48 at micro size."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=size["heads"], attention_head_dim=size["head"],
        in_channels=size["channels"], out_channels=size["channels"], text_dim=64, freq_dim=64, ffn_dim=size["ffn"],
        num_layers=size["blocks"], cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median, minimum and maximum of a's time over b's in interleaved rounds, after one warm-up each."""
    a(), b()
    pairs = [(seconds(a), seconds(b)) for _ in range(rounds)]
    ratios = [x / y for x, y in pairs]
    return {
        "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": rounds,
        "seconds": statistics.median(x for x, _ in pairs), "reference_seconds": statistics.median(y for _, y in pairs),
    }  # fmt: skip


def sampling(size: dict[str, Any], device: str, rounds: int) -> list[dict[str, Any]]:
    """Student sampling over effective NFE x teacher forward, one row a setting."""
    teacher = transformer(size).to(device)
    shape = (size["batch"], size["channels"], *size["latent"])
    noise, text = torch.randn(shape, device=device), torch.randn(size["batch"], size["text"], 64, device=device)
    t = torch.full((size["batch"],), 0.9, dtype=torch.float64, device=device)
    rows = []
    for m, n, h in SETTINGS:
        student = TMDStudent.from_teacher(teacher, h=h).to(device).eval()
        outer, inner = grid(m, 10.0), grid(n, 10.0)

        def sample() -> None:
            sample_tmd(student, text, noise, outer, inner, lambda: torch.randn(shape))  # noqa: B023

        @torch.inference_mode()
        def forward() -> None:
            velocity(teacher, noise, t, text)

        nfe = effective_nfe(m, n, h, size["blocks"])
        found = ratio(sample, forward, rounds)
        over = {key: found[key] / nfe for key in ("median", "low", "high")}
        rows.append({"m": m, "n": n, "h": h, "effective_nfe": nfe, "over_effective_nfe": over, **found})
    return rows


def rollout(size: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
    """Student turn of stage 2 at N = 2 over the same at N = 1, H / L = 1/6."""
    h = round(size["blocks"] / 6)
    teacher = transformer(size).requires_grad_(False).to(device)
    shape = (size["batch"], size["channels"], *size["latent"])
    batch = Batch(
        latents=torch.randn(shape, device=device), text=torch.randn(size["batch"], size["text"], 64, device=device)
    )
    negative = torch.randn(1, size["text"], 64, device=device)

    def update(n: int) -> Callable[[], None]:
        student = TMDStudent.from_teacher(teacher, h=h).to(device)
        method = TMDStage2(student, teacher, negative, Stage2Config(m=2, n=n))
        method.discriminator.to(device)
        optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5)

        def step() -> None:
            generator = torch.Generator().manual_seed(0)
            optimiser.zero_grad(set_to_none=True)
            sum(method.losses(batch, method.config.student_every, generator).values()).backward()  # type: ignore[union-attr]
            optimiser.step()

        return step

    return {"h": h, "blocks": size["blocks"], "paper": 1.17, **ratio(update(2), update(1), rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "benchmarks.student_speed", *sys.argv[1:]])
    result: dict[str, Any] = {**provenance(command=command, device=device), "sizes": {}}
    for name in args.size or sorted(SIZES):
        result["sizes"][name] = {
            "sampling": sampling(SIZES[name], device, args.rounds),
            "rollout_n2_over_n1": rollout(SIZES[name], device, args.rounds),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
