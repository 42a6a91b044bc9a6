"""``tmd-eval rerun``: run what made a report or run again, and compare the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rerun(
    folder: Annotated[Path, typer.Argument(help="Report folder or run folder.")],
    out: Annotated[Path, typer.Option(help="Empty folder for the new run.")] = Path("rerun"),
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run nothing; compare with this report or run.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Run the recorded command again and say whether the figures agree within their intervals (exit 5 if not).

    Example: tmd-eval rerun reports/quickstart --out /tmp/again
    After a rerun that was stopped and finished by hand: tmd-eval rerun reports/micro-matrix --against runs/again
    """
    import json
    import shlex

    from students.errors import QualityGateError
    from tmd_eval.rerun import against as compare_with
    from tmd_eval.rerun import recorded_command
    from tmd_eval.rerun import rerun as run

    if dry_run:
        typer.echo(f"tmd-eval {shlex.join(recorded_command(folder))}")
        return
    rows = run(folder, out) if against is None else compare_with(folder, against)
    if json_:
        typer.echo(json.dumps({"out": str(out if against is None else against), "figures": rows}))
    else:
        for row in rows:
            old, new, allowed = ("-" if row[k] is None else f"{row[k]:.4g}" for k in ("old", "new", "allowed"))
            verdict = "agrees" if row["agrees"] else "DIFFERS"
            typer.echo(f"{row['figure']:<60} {old:>9} {new:>9}  +- {allowed:>8}  {verdict}")
    different = [row["figure"] for row in rows if not row["agrees"]]
    if different:
        raise QualityGateError(f"{len(different)} of {len(rows)} figures differ: {', '.join(different)}")
