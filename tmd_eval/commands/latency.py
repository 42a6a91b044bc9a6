"""``tmd-eval latency``: seconds of text encoder, backbone, flow head, VAE and file, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def latency(
    ckpt: Annotated[list[str], typer.Option(help="What to time, as for generate; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for latency.json and the picture.")] = Path("latency"),
    batch: Annotated[list[int] | None, typer.Option(help="Videos at once; may be repeated [default: 1].")] = None,
    m: Annotated[
        list[int] | None, typer.Option("--m", help="M of students; may be repeated [default: as trained].")
    ] = None,
    teacher_m: Annotated[int, typer.Option(help="Steps of teachers.")] = 50,
    repeats: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep idle networks in the CPU's memory.")] = False,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles.")] = False,
    db: Annotated[str | None, typer.Option(help="Database [default: TMD_EVAL_DB or ./tmd-eval.db].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be timed; run nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print latency.json.")] = False,
) -> None:
    """Time models part by part: text encoder, DiT backbone, flow head, VAE, file.

    Writes latency.json and a stacked bar picture, and records the rows in the database.

    Example: tmd-eval latency --ckpt micro --ckpt runs/tmd_n2h5/checkpoint --batch 1 --batch 4
    """
    import gc
    import json
    import sys

    from tqdm import tqdm

    from leaderboard.record import record_latency
    from tmd_eval.files import write_atomic, write_json
    from tmd_eval.generate import open_model
    from tmd_eval.latency import Protocol, dominant, measure
    from tmd_eval.latency_figure import latency_figure
    from tmd_eval.provenance import provenance

    protocol = Protocol(
        repeats=repeats, warmup=warmup, batches=tuple(batch or (1,)), m=tuple(m or ()), teacher_m=teacher_m
    )
    if dry_run:
        planned = []
        for ref in ckpt:
            model = open_model(ref, device)
            for steps in (teacher_m,) if model.kind == "teacher" else (protocol.m or (None,)):
                settings = model.settings(steps)
                planned.append({"name": model.name, **{key: settings[key] for key in ("method", "m", "effective_nfe")}})
        plan = {"rows": planned, "batches": list(protocol.batches), "warmup": warmup, "repeats": repeats}
        shown = ", ".join(map(str, protocol.batches))
        lines = [
            f"{row['name']}: effective NFE {row['effective_nfe']:.4g}, batch {shown}, {warmup} + {repeats} runs"
            for row in planned
        ]
        typer.echo(json.dumps(plan) if json_ else "\n".join(lines))
        return
    rows = []
    place = "cpu"
    for ref in ckpt:  # one after the other, so that none takes memory from the next
        model = open_model(ref, device, offload=offload, vae_tiling=vae_tiling)
        place = str(model.base.device)
        with tqdm(desc=model.name, unit="run", file=sys.stderr) as bar:
            rows += measure(model, protocol, bar.update)
        del model
        gc.collect()
    result = {**provenance(device=place), "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "latency.json", result)
    for kind in ("svg", "png"):
        write_atomic(out / f"latency.{kind}", latency_figure(rows, result["device"], kind))
    record_latency(db, out / "latency.json")
    if json_:
        typer.echo(json.dumps(result))
        return
    titles = {"text": "text", "backbone": "backbone", "head": "head", "vae": "VAE", "write": "file"}
    columns = (*titles.values(), "total", "p95")
    heads = " ".join(f"{name:>9}" for name in columns)
    typer.echo(f"{'model':28} {'eff. NFE':>8} {'batch':>5} {heads}  most time")
    for row in rows:
        seconds = row["seconds"]
        shown = " ".join(
            f"{seconds[part]['median']:9.4g}" if seconds[part] else f"{'-':>9}" for part in (*titles, "total")
        )
        nfe = f"{row['effective_nfe']:.4g}" + ("x2" if row["guidance"] > 1 else "")
        most, p95 = titles[dominant(row)], seconds["total"]["p95"]
        typer.echo(f"{row['name'][:28]:28} {nfe:>8} {row['batch']:>5} {shown} {p95:9.4g}  {most}")
    typer.echo(f"seconds a batch, median of {repeats}; {out / 'latency.png'}", err=True)
