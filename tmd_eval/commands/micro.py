"""``tmd-eval micro``: the exact judges of the micro world on a checkpoint or on a video set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

NUM_PROMPTS = 512


def micro(
    ckpt: Annotated[
        str | None, typer.Option(help='Checkpoint folder, "micro" or pipeline folder; needs --out.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; an unfinished one is gone on with.")] = None,
    videos: Annotated[Path | None, typer.Option(help="Score this run folder instead of generating.")] = None,
    m: Annotated[
        int | None, typer.Option("--m", help="M, outer steps [default: the checkpoint's; teacher: 50].")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="N, inner steps of a TMD student.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of a teacher; 1 is none.")] = None,
    times: Annotated[
        str | None, typer.Option(help="Other times of a student, noisiest first, such as 0.999,0.5; M is their number.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Held-out captions; compare only runs with as many.")] = NUM_PROMPTS,
    samples_per_prompt: Annotated[int, typer.Option(help="Videos a caption; diversity needs 2.")] = 1,
    seed: Annotated[int, typer.Option(help="Base seed of the videos.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Stop after so many videos of the set.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Videos at once [default: 16].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Score what is there and say how much it is.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Score clips of the micro world: attributes, Fréchet distance, diversity, with 95 % intervals over captions.

    Example: tmd-eval micro --ckpt micro --m 2 --guidance 1 --out runs/undistilled-2
    """
    import json

    from students.errors import ConfigError
    from students.times import read_times
    from tmd_eval.micro_scores import score_run

    if (ckpt is None) == (videos is None) or (ckpt is None) != (out is None):
        raise ConfigError("Give either --ckpt C with --out RUN, or --videos RUN.")
    if ckpt is not None and out is not None:
        from tmd_eval import generate as generation
        from tmd_eval import video_set
        from tmd_eval.prompts import load_prompts

        prompts = load_prompts("micro", count=num_prompts)
        settings = generation.Settings(
            samples_per_prompt=samples_per_prompt, seed=seed, limit=limit, m=m, n=n, guidance=guidance,
            times=None if times is None else read_times(times), batch_size=batch_size,
        )  # fmt: skip
        generation.check_target(out)
        if dry_run:
            work = generation.plan(generation.open_model(ckpt, device), prompts, out, settings)
            plan = {"run": str(out), "videos": len(work.units), "missing": len(work.missing), "changed": work.changed}
            typer.echo(json.dumps(plan) if json_ else f"{plan['videos']} videos, {plan['missing']} to be made")
            return
        video_set.check_writable(out)
        model = generation.open_model(ckpt, device)
        with video_set.locked(out):
            generation.make(generation.plan(model, prompts, out, settings))
    run = out or videos
    assert run is not None
    if dry_run:
        typer.echo(json.dumps({"run": str(run)}) if json_ else f"would score {run}")
        return
    summary = score_run(run, allow_partial=allow_partial)
    if json_:
        typer.echo(json.dumps({"run": str(run), "summary": summary}))
        return
    for line in table(summary):
        typer.echo(line)


def table(summary: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: shares in percent, distances and ratios as they are."""
    lines = [f"{'dimension':<22}{'n':>6}{'value':>9}   95 % interval"]
    for name, entry in summary.items():
        share = name.startswith("alignment_")
        scale, unit = (100, " %") if share else (1, "")
        value, low, high = (f"{scale * entry[key]:.{1 if share else 2}f}" for key in ("value", "low", "high"))
        title = name.removeprefix("alignment_").replace("_", " ")
        lines.append(f"{title:<22}{entry['n']:>6}{value + unit:>9}   {low} to {high}{unit}")
    if "frechet" not in summary:
        lines.append("Fréchet distance: not measured (too few videos)")
    if "diversity" not in summary:
        lines.append("diversity: not measured (needs two readable videos of one caption; see --samples-per-prompt)")
    completeness = next(iter(summary.values()))["completeness"]
    if completeness < 1:
        lines.append(f"INCOMPLETE: {100 * completeness:.1f} % of the expected videos are scored")
    return lines
