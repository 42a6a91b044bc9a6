"""``tmd-eval ckpt``: what a checkpoint is, published students brought in, students taken out as diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Checkpoints of students: inspect, convert, export.\n\n"
    "Example: tmd-eval ckpt inspect rCM_Wan2.1_T2V_1.3B_480p.pt",
)
Ref = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, micro, pipeline folder, hub id, or a file of rCM, FastGen, FastVideo or original Wan.",
        metavar="CKPT",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


@app.command("inspect")
def inspect(ref: Ref, as_json: Json = False) -> None:
    """Say what a checkpoint is: layout, method, M, N, H, times, guidance, size; builds no network.

    Example: tmd-eval ckpt inspect runs/tmd_n2h5/checkpoint
    """
    from tmd_eval.checkpoints import inspect as look

    _show(look(ref), as_json)


@app.command("convert")
def convert(
    ref: Ref,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; an older one is replaced.")],
    base: Annotated[
        str | None, typer.Option(help="Pipeline folder or hub id of its base model [default: by the file's shape].")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Times in (0, 1], noisiest first, such as 0.999,0.937 [default: by layout].")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ode or sde; with --times [default: ode].")] = None,
    method: Annotated[str | None, typer.Option(help="Name of the method; with --times [default: student].")] = None,
    as_json: Json = False,
) -> None:
    """Write a published student as a checkpoint folder, weights unchanged.

    Example: tmd-eval ckpt convert rCM_Wan2.1_T2V_1.3B_480p.pt --out checkpoints/rcm
    """
    from students.errors import ConfigError
    from students.foreign import Schedule
    from students.times import grid_of, read_times
    from tmd_eval.checkpoints import convert as bring_in
    from tmd_eval.checkpoints import inspect as look

    schedule = None
    if times is not None:
        grid = tuple(grid_of(read_times(times)).tolist())
        schedule = Schedule(method=method or "student", outer_grid=grid, sampler=sampler or "ode", source="--times")
    elif sampler is not None or method is not None:
        raise ConfigError("--sampler and --method go with --times; give the times too.")
    bring_in(ref, out, base=base, schedule=schedule)
    _show(look(str(out)), as_json)


@app.command("export")
def export(
    ref: Ref,
    out: Annotated[Path, typer.Option(help="Pipeline folder to write; must be new or empty.")],
    base: Annotated[
        str | None, typer.Option(help="Base model of another project's file [default: by the file's shape].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model as a diffusers pipeline folder with a model card: for servers, diffusers, and --ckpt.

    Example: tmd-eval ckpt export runs/tmd_n2h5/checkpoint --out exported/tmd_n2h5
    """
    from tmd_eval.checkpoints import export as take_out

    _show(take_out(ref, out, base=base), as_json)


def _show(facts: dict[str, object], as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        if value in (None, [], ()):
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        elif isinstance(value, list | tuple):
            text = ", ".join(f"{item:.6g}" if isinstance(item, float) else str(item) for item in value)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        typer.echo(f"{key.replace('_', ' '):15} {text}")
