"""``tmd-eval generate``: videos from a checkpoint and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    ckpt: Annotated[str, typer.Option(help='Checkpoint folder, "micro", diffusers pipeline folder or hub id.')],
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished one is gone on with.")],
    prompts: Annotated[
        str | None, typer.Option(help='"vbench", "micro" or a file with one prompt a line.', metavar="SET|FILE")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A single prompt instead.", metavar="TEXT")] = None,
    m: Annotated[
        int | None, typer.Option("--m", help="M, outer steps [default: the checkpoint's; teacher: 50].")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="N, inner steps of a TMD student.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of a teacher; 1 is none.")] = None,
    times: Annotated[
        str | None, typer.Option(help="Other times of a student, noisiest first, such as 0.999,0.5; M is their number.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    samples_per_prompt: Annotated[
        int | None, typer.Option(help="Videos a prompt [default: 5 for vbench, else 1].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Base seed; each video's own seed is in the manifest.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Stop after so many videos of the set.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Videos at once [default: micro 16, else 1].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep networks in the CPU's memory while they do not compute.")
    ] = False,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory, slightly other pixels at seams.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Make the videos of a set of prompts; running it again makes only what is missing.

    On several GPUs: torchrun --nproc-per-node 8 -m -- tmd_eval.cli generate ... makes the same videos.

    Example: tmd-eval generate --ckpt micro --prompts micro --num-prompts 64 --m 50 --out runs/teacher
    """
    import json
    import os

    from students.errors import ConfigError
    from students.times import read_times
    from tmd_eval import generate as generation
    from tmd_eval import video_set
    from tmd_eval.prompts import load_prompts, single_prompt

    if (prompts is None) == (prompt is None):
        raise ConfigError("Give either --prompts vbench, micro or FILE, or --prompt TEXT.")
    chosen = load_prompts(prompts, count=num_prompts) if prompts else single_prompt(prompt or "")
    settings = generation.Settings(
        samples_per_prompt=(5 if chosen.named_by_prompt else 1) if samples_per_prompt is None else samples_per_prompt,
        seed=seed,
        limit=limit,
        m=m,
        n=n,
        guidance=guidance,
        times=None if times is None else read_times(times),
        batch_size=batch_size,
    )
    if dry_run:
        generation.check_target(out)
        model = generation.open_model(ckpt, device, vae_tiling=vae_tiling)
        work, made = generation.plan(model, chosen, out, settings), 0
    else:
        work, made = generation.run(ckpt, chosen, out, settings, device=device, offload=offload, vae_tiling=vae_tiling)
        if os.environ.get("RANK", "0") != "0":
            return  # the first rank speaks for all of torchrun's
        made = len(work.missing)
    before = len(work.units) - len(work.missing)
    result = {
        "run": str(out),
        "prompts": len(chosen.prompts),
        "samples_per_prompt": settings.samples_per_prompt,
        "videos": len(work.units),
        "present": before + made,
        "missing": len(work.missing) - made,
        "changed": work.changed,
        "made": made,
        "seconds_per_video": None if dry_run else _median_seconds(video_set.read_manifest(out)),
    }
    if json_:
        typer.echo(json.dumps(result))
    elif dry_run:
        typer.echo(
            f"{len(chosen.prompts)} prompts x {settings.samples_per_prompt} samples: {len(work.units)} videos, "
            f"{before} present, {len(work.missing)} missing, {work.changed} from other settings or damaged"
        )
    else:
        typer.echo(f"{len(work.units)} videos in {out / 'videos'} ({made} made now, {before} there before)")


def _median_seconds(rows: list[dict[str, object]]) -> float | None:
    import statistics

    seconds = [float(str(row["seconds"])) for row in rows if row.get("seconds") is not None]
    return statistics.median(seconds) if seconds else None
