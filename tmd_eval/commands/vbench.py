"""``tmd-eval vbench``: the official VBench in its own environment: set up, check, score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tmd_eval.generate import Settings
    from tmd_eval.prompts import PromptSet

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Score videos with the official VBench.\n\nExample: tmd-eval vbench --videos DIR --out runs/mine",
)


@app.callback()
def vbench(
    context: typer.Context,
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint; its videos are generated first if missing.")] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of mp4 files, or a run, instead of a checkpoint.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; scores go to its scores/.")] = None,
    dimensions: Annotated[
        list[str] | None, typer.Option(help="Dimensions, comma-separated [default: temporal_flickering].")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help='With --ckpt: "vbench", "micro" or a file.', metavar="SET|FILE")
    ] = "vbench",
    m: Annotated[int | None, typer.Option("--m", help="M, outer steps [default: the checkpoint's].")] = None,
    n: Annotated[int | None, typer.Option("--n", help="N, inner steps of a TMD student.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of a teacher; 1 is none.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first so many prompts of the dimensions.")] = None,
    samples_per_prompt: Annotated[int | None, typer.Option(help="Videos a prompt [default: vbench 5, else 1].")] = None,
    seed: Annotated[int, typer.Option(help="Base seed.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Stop after so many videos.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Videos at once [default: micro 16, else 1].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    db: Annotated[
        str | None, typer.Option(help="Database to record in [default: TMD_EVAL_DB or ./tmd-eval.db].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be generated and scored.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a checkpoint's videos, or a folder's; a run whose checkpoint is known is recorded in the database."""
    if context.invoked_subcommand is not None:
        return
    if ckpt is None and videos is None and out is None and not dimensions:
        typer.echo(context.get_help())
        return
    import json

    import torch

    from students.errors import ConfigError
    from tmd_eval import generate as generation
    from tmd_eval.vbench import runner
    from tmd_eval.vbench import score as scoring
    from tmd_eval.video_set import MANIFEST

    if (ckpt is None) == (videos is None):
        raise ConfigError("Give either --ckpt CHECKPOINT or --videos DIR.")
    if out is None:
        raise ConfigError("Give --out RUN, the folder for the scores.")
    names = list(dict.fromkeys(d for text in dimensions or ["temporal_flickering"] for d in text.split(",") if d))
    for name in names:
        runner.check_ready(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = videos
    if ckpt is not None:
        chosen, settings = _settings(
            prompts, names, num_prompts, samples_per_prompt, seed, limit, m, n, guidance, batch_size
        )
        folder = out
        if dry_run:
            work = generation.plan(generation.open_model(ckpt, device), chosen, out, settings)
            result = {"videos": len(work.units), "missing": len(work.missing), "dimensions": names}
            typer.echo(
                json.dumps(result)
                if json_
                else f"{len(work.units)} videos, {len(work.missing)} to generate; then {names}"
            )
            return
        generation.run(ckpt, chosen, out, settings, device=device)
    assert folder is not None
    if dry_run:
        found = {name: scoring.select(folder, name) for name in names}
        counts = {name: {"videos": len(s.videos), "missing": len(s.missing)} for name, s in found.items()}
        typer.echo(json.dumps(counts) if json_ else "\n".join(f"{name}: {c}" for name, c in counts.items()))
        return
    entries = scoring.score(folder, out, names, device=device)
    recorded = None
    if (out / "config.yaml").is_file() and (out / MANIFEST).is_file():  # else nobody knows what made the videos
        from leaderboard.record import record_run

        recorded = record_run(db, out)
    if json_:
        typer.echo(json.dumps({"run": str(out), "recorded": recorded, "scores": entries}))
        return
    for name, entry in entries.items():
        between = "" if entry["low"] is None else f" ({100 * entry['low']:.2f} to {100 * entry['high']:.2f})"
        share = "" if entry["completeness"] == 1 else f", {100 * entry['completeness']:.1f} % of the protocol's videos"
        typer.echo(f"{name}: {100 * entry['value']:.2f} %{between}, {entry['n']} videos{share}")


def _settings(
    source: str, dimensions: list[str], num_prompts: int | None, samples: int | None, seed: int, limit: int | None,
    m: int | None, n: int | None, guidance: float | None, batch_size: int | None,
) -> tuple[PromptSet, Settings]:  # fmt: skip
    """The prompt set and how to sample it; of VBench's set only the prompts of the dimensions."""
    from tmd_eval.generate import Settings
    from tmd_eval.prompts import load_prompts, vbench_prompts

    chosen = load_prompts(source, count=None if source == "vbench" else num_prompts)
    lines = None
    if chosen.named_by_prompt:
        wanted = set(vbench_prompts(dimensions).first(num_prompts).prompts)
        lines = tuple(line for line, prompt in enumerate(chosen.prompts) if prompt in wanted)
        samples = 5 if samples is None else samples
    settings = Settings(
        samples_per_prompt=1 if samples is None else samples, seed=seed, limit=limit, lines=lines, m=m, n=n,
        guidance=guidance, batch_size=batch_size,
    )  # fmt: skip
    return chosen, settings


@app.command("setup")
def setup(
    force: Annotated[bool, typer.Option("--force", help="Build it anew.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete it.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Build VBench's environment (about 40 s, 0.6 GB, needs the package index).

    Example: tmd-eval vbench setup
    """
    import json

    from tmd_eval.vbench import environment

    if remove:
        found = environment.remove()
        path = str(environment.folder())
        typer.echo(
            json.dumps({"path": path, "removed": found})
            if json_
            else f"{path} {'removed' if found else 'was not there'}"
        )
        return
    result = environment.setup(force=force, log=lambda text: typer.echo(text, err=True))
    state = "built" if result["built"] else "already there"
    text = f"{result['path']}: {state}, {result['megabytes']} MB, {result['seconds']} s"
    typer.echo(json.dumps(result) if json_ else text)


@app.command("doctor")
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """For each of the sixteen dimensions: can it be scored here, and if not, why.

    Example: tmd-eval vbench doctor
    """
    import json

    from tmd_eval.vbench import runner

    rows = runner.diagnose()
    if json_:
        typer.echo(json.dumps({"version": runner.official_version(), "dimensions": rows}))
        return
    for row in rows:
        lacks = [*([row["reason"]] if row["reason"] else []), *(f"no {Path(p).name}" for p in row["missing_weights"])]
        typer.echo(f"{row['dimension']:24} {'ready' if row['ready'] else '; '.join(lacks)}")
