"""Speed and memory at Wan2.1 1.3B size on one GPU, random weights; every figure beside the bound it is held to.

    python -m benchmarks.gpu_wan                   # 80 GB, 9 minutes at most; writes reports/gpu/wan_1.3b.{json,md}
    python -m benchmarks.gpu_wan --size tiny --device cpu --rounds 1 --warmup 0 --out /tmp/gpu

Run on an H200 in four minutes: reports/gpu/. The second line runs the same code on the CPU in seconds, as a test does;
it shows only that it runs. From a checkout nothing need be installed but torch, diffusers, transformers, ftfy,
pyyaml, tqdm and pillow. Measured at 21 x 60 x 104 latents (81 frames of 480x832), bf16, batch 1:

- one teacher forward through ``students.base.velocity`` against diffusers' own forward, and its TFLOP/s as a share of
  the largest bf16 matrix product's;
- peak memory of a stage 1 update at batch 1, and the memory ``tmd-eval plan`` foretells, within 15 %;
- a student update of stage 2 at N2H5 over one of plain DMD2-v, at most 1.17; one after the other, since both together
  take more than 80 GB;
- TMD-N2H5 and N4H5 at M = 1 and 2: time of the DiT over effective NFE times a teacher forward, at most 1.03.

What fails or finds no time left is named in the table, the rest stands; files are written after every part.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from students.base import velocity
from students.config import TrainConfig, load_config
from students.method import Batch
from students.nfe import effective_nfe
from students.parallel import embed_time_in_full, store_low
from students.sampling import sample_tmd
from students.times import grid
from students.tmd import TMDStudent
from tmd_eval.files import write_atomic, write_json
from tmd_eval.plan import block_flops, make_plan, sizes_of
from tmd_eval.plan_activations import Sizes
from tmd_eval.provenance import provenance

TINY = Sizes(
    transformer={
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": 12, "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    },
    latent=(4, 3, 16, 16), text_length=12,
)  # fmt: skip
EXAMPLES = Path(__file__).parents[1] / "examples"


class Bench:
    """Networks of one size on one device.

    Args:
        sizes: shapes.
        device: "cuda" or "cpu".
        rounds: timed rounds.
        warmup: rounds before them.
    """

    def __init__(self, sizes: Sizes, device: str, rounds: int, warmup: int) -> None:
        self.sizes, self.device, self.rounds, self.warmup = sizes, torch.device(device), rounds, warmup
        torch.manual_seed(0)
        with self.device:  # 1.4 billion random numbers take a CPU half a minute
            self.teacher = WanTransformer3DModel.from_config(sizes.transformer).eval().requires_grad_(False)
        store_low(self.teacher)
        self.teacher.to(self.device)
        self.x = torch.randn(1, *sizes.latent, device=self.device)
        self.text = torch.randn(1, sizes.text_length, sizes.transformer["text_dim"], device=self.device)
        self.t = torch.full((1,), 0.9, dtype=torch.float64, device=self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Device time of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1000

    def times(self, *calls: Callable[[], object]) -> list[list[float]]:
        """Device times of each call in interleaved rounds, after the warm-up."""
        rounds = [[self.seconds(call) for call in calls] for _ in range(self.warmup + self.rounds)][self.warmup :]
        return [list(column) for column in zip(*rounds, strict=True)]

    def ratio(self, a: Callable[[], object], b: Callable[[], object]) -> dict[str, float]:
        """Median, least and largest ratio of a's time to b's in the same round."""
        ours, theirs = self.times(a, b)
        return _compared([x / y for x, y in zip(ours, theirs, strict=True)], ours, theirs)

    @torch.inference_mode()
    def forward(self) -> None:
        """Our teacher forward."""
        velocity(self.teacher, self.x, self.t, self.text)

    @torch.inference_mode()
    def own_forward(self) -> None:
        """diffusers' forward of the same network on the same inputs."""
        self.teacher(
            hidden_states=self.x.bfloat16(), timestep=1000 * self.t, encoder_hidden_states=self.text.bfloat16(),
            return_dict=False,
        )  # fmt: skip

    def ceiling(self) -> float:
        """TFLOP/s of a large bf16 matrix product: the best of the rounds."""
        side = 8192 if self.device.type == "cuda" else 256
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        best = min(self.seconds(lambda: a @ b) for _ in range(self.warmup + self.rounds))
        return 2 * side**3 / best / 1e12

    def sampling(self) -> list[dict[str, Any]]:
        """TMD students' DiT time over effective NFE x teacher forward."""
        rows, blocks, x = [], self.sizes.transformer["num_layers"], self.x
        for m, n in ((1, 2), (2, 2), (1, 4), (2, 4)):
            student = TMDStudent.from_teacher(self.teacher, h=5).eval().requires_grad_(False)
            store_low(student)
            student.to(self.device)
            outer, inner = grid(m, 10.0), grid(n, 10.0)
            y1 = torch.randn_like(x)

            def sample(
                student: TMDStudent = student, outer: torch.Tensor = outer, inner: torch.Tensor = inner,
                y1: torch.Tensor = y1,
            ) -> None:  # fmt: skip
                sample_tmd(student, self.text, x, outer, inner, lambda: y1)

            found, nfe = self.ratio(sample, self.forward), effective_nfe(m, n, 5, blocks)
            over = {key: found[key] / nfe for key in ("median", "low", "high")}
            rows.append({"m": m, "n": n, "h": 5, "effective_nfe": nfe, "over_effective_nfe": over, **found})
        return rows

    def update(self, config: TrainConfig, iteration: int) -> Callable[[], None]:
        """One update of the networks whose turn it is, as the trainer does it on one GPU."""
        kind = config.kind
        teacher = self.teacher
        if kind.flow_head:
            student: torch.nn.Module = TMDStudent.from_teacher(teacher, h=config.student.h)
        else:
            student = copy.deepcopy(teacher).float().requires_grad_(True)
        negative = self.text[:1].clone()
        method = kind.build(student.to(self.device), teacher, negative, config.method)
        teacher.enable_gradient_checkpointing()
        for network in method.networks.values():
            network.to(self.device).float().train()
            embed_time_in_full(network, self.device)
            if hasattr(network, "enable_gradient_checkpointing"):
                network.enable_gradient_checkpointing()
        turn = method.turn(iteration)
        optimisers = {
            name: torch.optim.AdamW(network.parameters(), lr=1e-5) for name, network in method.networks.items()
        }
        batch = Batch(latents=self.x, text=self.text)

        def step() -> None:
            for name in turn:
                optimisers[name].zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                losses = method.losses(batch, iteration, torch.Generator().manual_seed(0))
            torch.stack([loss.double() for loss in losses.values()]).sum().backward()
            for name in turn:
                optimisers[name].step()

        return step

    def peak(self, step: Callable[[], None]) -> int | None:
        """Largest memory of tensors over two updates; None without a GPU."""
        if self.device.type != "cuda":
            step()
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated()

    def free(self) -> None:
        """Give back what the last part took."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _compared(ratios: list[float], ours: list[float], theirs: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": len(ratios),
        "seconds": statistics.median(ours), "reference_seconds": statistics.median(theirs),
    }  # fmt: skip


def configuration(name: str, *settings: str) -> TrainConfig:
    """An example's configuration at batch 1 on one GPU."""
    common = ["batch=1", "micro_batch=1", "gradient_checkpointing=true", "precision=bf16", *settings]
    return load_config(EXAMPLES / name, common)


def teacher_forward(bench: Bench) -> dict[str, Any]:
    """Our forward against diffusers', and its share of the largest matrix product's rate."""
    ceiling, found = bench.ceiling(), bench.ratio(bench.forward, bench.own_forward)
    rate = block_flops(bench.sizes) * bench.sizes.transformer["num_layers"] / found["seconds"] / 1e12
    return {**found, "tflops": rate, "ceiling_tflops": ceiling, "share_of_ceiling": rate / ceiling}


def stage1_memory(bench: Bench) -> dict[str, Any]:
    """Peak of stage 1's update, and what the plan says."""
    stage1 = configuration("wan1.3b_tmd_n2h5_stage1.yaml", "ema=0")
    peak = bench.peak(bench.update(stage1, 1))
    foretold = make_plan(stage1, 1, bench.sizes).memory.total
    return {"peak_bytes": peak, "plan_bytes": foretold, "ratio": None if peak is None else foretold / peak}


def stage2_over_dmd2v(bench: Bench) -> dict[str, Any]:
    """Student updates: stage 2 at N2H5, then DMD2-v."""
    configs = (configuration("wan1.3b_tmd_n2h5_stage2.yaml", "parent="), configuration("wan1.3b_dmd2v_m2.yaml"))
    found = []
    for config in configs:
        found.extend(bench.times(bench.update(config, 5)))
        bench.free()
    ours, theirs = found
    middle = statistics.median(theirs)
    return _compared([x / middle for x in ours], ours, theirs)


PARTS: dict[str, Callable[[Bench], Any]] = {
    "teacher_forward": teacher_forward,
    "stage1_memory": stage1_memory,
    "stage2_over_dmd2v": stage2_over_dmd2v,
    "sampling": Bench.sampling,
}
"""What is measured, in this order."""


def measure(bench: Bench, limit: float, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts, each by itself.

    Args:
        bench: the networks.
        limit: seconds after which no further part starts.
        done: gets what is there after every part.

    Returns:
        The parts by name, and under "failed" why some are not there.
    """
    start = time.monotonic()
    result: dict[str, Any] = {"failed": {}}
    for name, part in PARTS.items():
        spent = time.monotonic() - start
        if spent > limit:
            result["failed"][name] = f"not started, as {spent:.0f} s of {limit:.0f} were over"
        else:
            try:
                result[name] = part(bench)
            except Exception as error:  # out of memory, a kernel that is missing: the other parts stand by themselves
                result["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            bench.free()
        print(f"{name}: {result['failed'].get(name, 'measured')}, {time.monotonic() - start:.0f} s", file=sys.stderr)
        done(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = []
    if forward := result.get("teacher_forward"):
        rows += [
            f"| teacher forward over diffusers' own | {forward['median']:.3f} | at most 1 |",
            f"| teacher forward, share of {forward['ceiling_tflops']:.3g} TFLOP/s "
            f"| {forward['share_of_ceiling']:.1%} | |",
        ]
    if memory := result.get("stage1_memory"):
        peak = "no GPU" if memory["peak_bytes"] is None else f"{memory['peak_bytes'] / 2**30:.1f} GiB"
        rows.append(
            f"| peak memory of stage 1, batch 1 | {peak} | plan: {memory['plan_bytes'] / 2**30:.1f} GiB, within 15 % |"
        )
    if update := result.get("stage2_over_dmd2v"):
        rows.append(f"| stage 2 update at N2H5 over DMD2-v update | {update['median']:.3f} | at most 1.17 |")
    rows += [
        f"| TMD-N{row['n']}H{row['h']}, M = {row['m']}: DiT time over effective NFE x teacher forward "
        f"| {row['over_effective_nfe']['median']:.3f} | at most 1.03 |"
        for row in result.get("sampling", ())
    ]
    rows += [f"| {name.replace('_', ' ')} | not measured: {why.replace('|', '/')} | |" for name, why in
             result["failed"].items()]  # fmt: skip
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    head = [
        f"Device: {result['device']}; {packages}. Command: `{result['command']}`, revision {result['code_revision']}.",
        "",
    ]
    return "\n".join([*head, "| figure | measured | bound |", "|---|---|---|", *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; returns 3 if a part is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("1.3b", "tiny"), default="1.3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=400, help="No part starts later than this.")
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    args = parser.parse_args(arguments)
    sizes = TINY if args.size == "tiny" else sizes_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    command = f"python -m benchmarks.gpu_wan --size {args.size} --device {args.device} --rounds {args.rounds}"
    facts = {**provenance(command=f"{command} --warmup {args.warmup}", device=args.device), "size": args.size}
    args.out.mkdir(parents=True, exist_ok=True)

    def write(parts: dict[str, Any]) -> None:
        result = {**facts, **parts}
        write_json(args.out / f"wan_{args.size}.json", result)
        write_atomic(args.out / f"wan_{args.size}.md", table(result))

    result = measure(Bench(sizes, args.device, args.rounds, args.warmup), args.seconds, write)
    print(table({**facts, **result}))
    return 3 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
