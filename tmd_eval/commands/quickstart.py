"""``tmd-eval quickstart``: the whole road in the micro world, ending in a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of everything; an unfinished one is gone on with.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of training and of the videos.")] = 0,
    num_prompts: Annotated[
        int, typer.Option(help="Held-out captions for the student and the undistilled teacher.")
    ] = 512,
    teacher_prompts: Annotated[int, typer.Option(help="Held-out captions for the teacher at 50 steps.")] = 128,
    samples_per_prompt: Annotated[int, typer.Option(help="Videos a caption; diversity needs 2.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report's rows as JSON.")] = False,
) -> None:
    """Distil the micro teacher, generate, score and report: about ten minutes on two cores.

    Example: tmd-eval quickstart --out quickstart
    """
    import json

    from tmd_eval.quickstart import PRESETS, Quickstart
    from tmd_eval.quickstart import quickstart as run

    plan = Quickstart(
        out=out, seed=seed, num_prompts=num_prompts, teacher_prompts=teacher_prompts,
        samples_per_prompt=samples_per_prompt,
    )  # fmt: skip
    if dry_run:
        videos = samples_per_prompt * (2 * num_prompts + teacher_prompts)
        typer.echo(f"train {PRESETS[0]}, then {PRESETS[1]}; make and score {videos} videos; report in {out / 'report'}")
        return
    page = run(plan)
    report = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    if json_:
        typer.echo(json.dumps({"report": str(page), "rows": report["rows"]}))
        return
    typer.echo((page.parent / "leaderboard.md").read_text(encoding="utf-8"))
    typer.echo(f"Report: {page}")
