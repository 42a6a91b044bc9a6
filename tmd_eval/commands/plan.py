"""``tmd-eval plan``: what a training run takes, before any GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[Path, typer.Argument(help="YAML config; see examples/.", metavar="CONFIG.yaml")],
    gpus: Annotated[int, typer.Option(help="GPUs the run has.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Memory of one GPU, GiB.")] = 80.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Sustained TFLOP/s of one GPU; adds hours, recomputation not counted.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Parameters, operations per update and memory per GPU of a training run; says whether it fits and what to change.

    Needs no GPU and no weights. Exits with 5 if the run does not fit.

    Example: tmd-eval plan examples/wan1.3b_tmd_n2h5_stage2.yaml --gpus 8 --gpu-memory 80
    """
    import json

    from students.config import load_config
    from students.errors import ConfigError, QualityGateError
    from tmd_eval.plan import RESERVE, advice, make_plan

    if gpus < 1 or not gpu_memory > 0:
        raise ConfigError(f"--gpus is {gpus} and --gpu-memory {gpu_memory:g}; they must be at least 1 and above 0.")
    run = load_config(config, set_ or [])
    found = make_plan(run, gpus)
    memory, gib = found.memory, 2**30
    fits = found.fits(gpu_memory)
    changes = [] if fits else advice(found, gpu_memory)
    parts = {
        **{f"weights, {name.replace('_', ' ')}": size for name, size in memory.weights.items()},
        "working copies": memory.gathered, "gradients": memory.gradients, "optimiser": memory.optimiser,
        "moving average": memory.average, "activations": memory.activations,
    }  # fmt: skip
    whole = found.flops_setup + found.flops_iteration * run.iterations
    hours = None if tflops is None else whole / (tflops * 1e12) / 3600
    if as_json:
        result = {
            "config": str(config), "gpus": gpus, "gpu_memory_gib": gpu_memory, "parameters": found.parameters,
            "flops_teacher_forward": found.flops_forward, "flops_iteration": found.flops_iteration,
            "flops_setup": found.flops_setup, "iterations": run.iterations, "gpu_hours": hours,
            "turn": list(memory.turn), "moment": memory.moment, "bytes_per_gpu": parts,
            "total_bytes_per_gpu": memory.total, "fits": fits,
            "changes": [
                {"change": what, "total_bytes_per_gpu": other.memory.total, "fits": other.fits(gpu_memory)}
                for what, other in changes
            ],
        }  # fmt: skip
        typer.echo(json.dumps(result))
    else:
        for name, count in found.parameters.items():
            typer.echo(f"{'parameters, ' + name.replace('_', ' '):36} {count:>16,}")
        typer.echo(f"{'teacher forward, one sample':36} {_tera(found.flops_forward):>16} TFLOP")
        typer.echo(f"{'one iteration, the whole batch':36} {_tera(found.flops_iteration):>16} TFLOP")
        if found.flops_setup:
            typer.echo(f"{'teacher trajectories, once':36} {_tera(found.flops_setup):>16} TFLOP")
        if hours is not None:
            typer.echo(f"{f'{run.iterations:,} iterations at {tflops:g} TFLOP/s':36} {hours:16,.0f} GPU-hours")
        for name, size in parts.items():
            typer.echo(f"{name:36} {size / gib:16.2f} GiB a GPU")
        when = " and ".join(name.replace("_", " ") for name in memory.turn) + f", {memory.moment}"
        typer.echo(f"{'total, turn of ' + when:36} {memory.total / gib:16.2f} GiB of {gpu_memory:g}")
        typer.echo(f"fits, {RESERVE:.0%} spared" if fits else "does not fit; change, each on top of those before it:")
        for what, other in changes:
            verdict = "fits" if other.fits(gpu_memory) else "does not fit yet"
            typer.echo(f"  {what:42} {other.memory.total / gib:8.2f} GiB, {verdict}")
    if not fits:
        raise QualityGateError(
            f"{config} needs {memory.total / gib:.1f} GiB on each of {gpus} GPUs, which have {gpu_memory:g}."
        )


def _tera(operations: float) -> str:
    """Four digits, written out: 116,500 rather than 1.165e+05."""
    value = float(f"{operations / 1e12:.4g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
