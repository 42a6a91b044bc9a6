"""``tmd-eval train``: the trainer, the same code as ``torchrun ... -m students.train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML config; see examples/.", metavar="CONFIG.yaml")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest state in the config's out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan; train nothing.")
    ] = False,
) -> None:
    """Train a student and print its checkpoint folder.

    Example: tmd-eval train examples/micro_tmd_n2h2_stage1.yaml --set out=runs/first --set iterations=50
    """
    from students.train import run_file

    typer.echo(run_file(config, overrides=set_ or [], resume=resume, dry_run=dry_run))
