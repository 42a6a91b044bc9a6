"""Speed and memory at Wan2.1 1.3B size on one GPU, random weights; every figure beside the bound it is held to.

    python -m benchmarks.gpu_wan --out reports/gpu

Not run yet: no GPU was lent to the session that wrote it. ``--size tiny --device cpu`` runs the same code in seconds
and shows only that it runs. Measured at 21 x 60 x 104 latents (81 frames of 480x832), bf16, batch 1:

- one teacher forward through ``students.base.velocity`` against diffusers' own forward, and its TFLOP/s as a share of
  the largest bf16 matrix product's;
- TMD-N2H5 and N4H5 at M = 1 and 2: time of the DiT over effective NFE times a teacher forward, at most 1.03;
- a student update of stage 2 at N2H5 over one of plain DMD2-v, at most 1.17;
- peak memory of a stage 1 update at batch 1, and the memory ``tmd-eval plan`` foretells, within 15 %.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
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
    """

    def __init__(self, sizes: Sizes, device: str, rounds: int) -> None:
        self.sizes, self.device, self.rounds = sizes, torch.device(device), rounds
        torch.manual_seed(0)
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

    def ratio(self, a: Callable[[], object], b: Callable[[], object]) -> dict[str, float]:
        """Median, least and largest ratio of a's time to b's in interleaved rounds, after two warm-up rounds."""
        pairs = [(self.seconds(a), self.seconds(b)) for _ in range(self.rounds + 2)][2:]
        ratios = [x / y for x, y in pairs]
        return {
            "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": len(ratios),
            "seconds": statistics.median(x for x, _ in pairs),
            "reference_seconds": statistics.median(y for _, y in pairs),
        }  # fmt: skip

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
        best = min(self.seconds(lambda: a @ b) for _ in range(self.rounds + 2))
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
        teacher.enable_gradient_checkpointing()
        if kind.flow_head:
            student: torch.nn.Module = TMDStudent.from_teacher(teacher, h=config.student.h)
        else:
            student = copy.deepcopy(teacher).float().requires_grad_(True)
        negative = self.text[:1].clone()
        method = kind.build(student.to(self.device), teacher, negative, config.method)
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
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated()


def configuration(name: str, *settings: str) -> TrainConfig:
    """An example's configuration at batch 1 on one GPU."""
    common = ["batch=1", "micro_batch=1", "gradient_checkpointing=true", "precision=bf16", *settings]
    return load_config(EXAMPLES / name, common)


def measure(bench: Bench) -> dict[str, Any]:
    """All figures of the module's docstring."""
    ceiling = bench.ceiling()
    forward = bench.ratio(bench.forward, bench.own_forward)
    flops = block_flops(bench.sizes) * bench.sizes.transformer["num_layers"]
    rate = flops / forward["seconds"] / 1e12
    result: dict[str, Any] = {
        "ceiling_tflops": ceiling, "teacher_forward": {**forward, "tflops": rate, "share_of_ceiling": rate / ceiling},
        "sampling": bench.sampling(),
    }  # fmt: skip
    stage2, dmd = configuration("wan1.3b_tmd_n2h5_stage2.yaml", "parent="), configuration("wan1.3b_dmd2v_m2.yaml")
    result["stage2_over_dmd2v"] = bench.ratio(bench.update(stage2, 5), bench.update(dmd, 5))
    stage1 = configuration("wan1.3b_tmd_n2h5_stage1.yaml", "ema=0")
    peak = bench.peak(bench.update(stage1, 1))
    foretold = make_plan(stage1, 1, bench.sizes).memory.total
    result["stage1_memory"] = {
        "peak_bytes": peak, "plan_bytes": foretold, "ratio": None if peak is None else foretold / peak,
    }  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        f"| teacher forward over diffusers' own | {result['teacher_forward']['median']:.3f} | at most 1 |",
        f"| teacher forward, share of {result['ceiling_tflops']:.0f} TFLOP/s "
        f"| {result['teacher_forward']['share_of_ceiling']:.1%} | |",
    ]
    rows += [
        f"| TMD-N{row['n']}H{row['h']}, M = {row['m']}: DiT time over effective NFE x teacher forward "
        f"| {row['over_effective_nfe']['median']:.3f} | at most 1.03 |"
        for row in result["sampling"]
    ]
    memory = result["stage1_memory"]
    peak = "-" if memory["peak_bytes"] is None else f"{memory['peak_bytes'] / 2**30:.1f} GiB"
    rows += [
        f"| stage 2 update at N2H5 over DMD2-v update | {result['stage2_over_dmd2v']['median']:.3f} | at most 1.17 |",
        f"| peak memory of stage 1, batch 1 | {peak} | plan: {memory['plan_bytes'] / 2**30:.1f} GiB, within 15 % |",
    ]
    head = [f"Device: {result['device']}. Command: `{result['command']}`, revision {result['code_revision']}.", ""]
    return "\n".join([*head, "| figure | measured | bound |", "|---|---|---|", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("1.3b", "tiny"), default="1.3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = TINY if args.size == "tiny" else sizes_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    result = measure(Bench(sizes, args.device, args.rounds))
    command = f"python -m benchmarks.gpu_wan --size {args.size} --device {args.device} --rounds {args.rounds}"
    result = {**provenance(command=command, device=args.device), "size": args.size, **result}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"wan_{args.size}.json", result)
        write_atomic(args.out / f"wan_{args.size}.md", table(result))


if __name__ == "__main__":
    main()
