"""``tmd-eval leaderboard``: record runs, look at the rows, build the report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Record runs in the database, show its rows, build the report.\n\nStart with: tmd-eval leaderboard add RUN",
)

Database = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", help="Database URL or SQLite file; else TMD_EVAL_DB, else ./tmd-eval.db."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder; or latency.json, preferences.json, or a report with claims."),
    ],
    name: Annotated[str | None, typer.Option(help="Name people see; by default such as TMD-N2H2, M = 2.")] = None,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Record a run, or a file of latencies, preferences or claims; recording it again updates its rows.

    Example: tmd-eval leaderboard add runs/tmd --name TMD-N2H2
    """
    from leaderboard.errors import LeaderboardError
    from leaderboard.record import record_claims, record_latency, record_preferences, record_run

    def claims(db: str | None, path: Path) -> list[int]:
        return record_claims(db, path.parent if path.name == "report.json" else path, name=name)

    for file, record in (
        ("latency.json", record_latency),
        ("preferences.json", record_preferences),
        ("report.json", claims),
    ):
        if run.name == file or (not (run / "config.yaml").is_file() and (run / file).is_file()):
            if name is not None and record is not claims:
                raise LeaderboardError(f"--name is for runs and reports; {file} names its rows itself.")
            rows = record(db, run)
            typer.echo(json.dumps({"rows": rows}) if as_json else f"{len(rows)} rows of {run}")
            return
    row = record_run(db, run, name=name)
    typer.echo(json.dumps({"row": row}) if as_json else f"row {row}")


@app.command(name="import")
def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="published|FILE", help="The shipped published rows, a CSV of such rows, or a bundle."),
    ],
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that the sender of a bundle told you.")] = None,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Load published figures, or another lab's bundle; importing again changes nothing.

    Example: tmd-eval leaderboard import published; tmd-eval leaderboard import results.csv
    """
    from leaderboard.bundle import import_bundle
    from leaderboard.errors import LeaderboardError
    from leaderboard.published import import_csv, import_published

    path = Path(source)
    if path.suffix.lower() == ".zip":
        counts = import_bundle(db, path, sha256=sha256)
    elif sha256 is not None:
        raise LeaderboardError(f"--sha256 is for bundles (.zip), and {source} is none.")
    else:
        counts = import_published(db) if source == "published" else import_csv(db, path)
    typer.echo(json.dumps(counts) if as_json else ", ".join(f"{count} {name}" for name, count in counts.items()))


@app.command()
def export(
    out: Annotated[Path, typer.Option(metavar="FILE.zip", help="The bundle.")],
    row: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Only this measured row; may be repeated.")
    ] = None,
    lab: Annotated[str, typer.Option(help="Who sends it; shown where it is imported.")] = "",
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Write rows, their provenance, hashes and thumbnails as one file for another lab's board.

    Example: tmd-eval leaderboard export --out ours.zip --lab "Lab A"
    """
    from leaderboard.bundle import export_bundle
    from leaderboard.errors import LeaderboardError

    if out.suffix.lower() != ".zip":
        raise LeaderboardError(f"A bundle is a .zip file; {out} is none.")
    done = export_bundle(db, out, rows=row or None, lab=lab)
    typer.echo(json.dumps({"bundle": str(out), **done}) if as_json else f"{done['rows']} rows, sha256 {done['sha256']}")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    db: Database = None,
) -> None:
    """Browse the database in a page that follows it; needs pip install 'tmd-eval[study]'.

    Example: tmd-eval leaderboard serve --db results.db
    """
    from leaderboard.serve import page

    page(db).launch(server_name=host, server_port=port, share=False, quiet=True)


@app.command()
def show(
    sort: Annotated[
        str | None, typer.Option(help="Field or metric to sort by; a leading - sorts downwards (--sort=-joint).")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Rows whose field is this (also !=, <, <=, >, >=); repeatable."),
    ] = None,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Show the rows of the database, measured ones first, then published ones.

    Example: tmd-eval leaderboard show --where role=student --where "m<=2" --sort=-alignment_joint
    """
    from leaderboard.query import show as query

    rows = query(db, where=where or [], sort=sort)
    typer.echo(json.dumps(rows, indent=2, ensure_ascii=False) if as_json else _table(rows, filtered=bool(where)))


@app.command()
def build(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the site.")],
    title: Annotated[str | None, typer.Option(help="Heading of the pages.")] = None,
    row: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Only this measured row; may be repeated.")
    ] = None,
    clips: Annotated[bool, typer.Option(help="Show clips side by side, from the recorded run folders.")] = True,
    published: Annotated[
        bool, typer.Option("--published", help="The shipped published rows alone, no database.")
    ] = False,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Write the site: index, a page for each model, comparison, claims, figures and tables.

    Example: tmd-eval leaderboard build --out site
    """
    from leaderboard.errors import LeaderboardError
    from leaderboard.published import PUBLISHED_TITLE, import_published
    from leaderboard.site import build_site
    from tmd_eval.provenance import command_line

    command = command_line()
    if published:
        if db or row:
            raise LeaderboardError("--published takes no --db and no --row: it shows the shipped rows alone.")
        with tempfile.TemporaryDirectory() as folder:
            db = str(Path(folder) / "published.db")
            import_published(db)
            page = build_site(db, out, title=title or PUBLISHED_TITLE, command=command)
    else:
        page = build_site(
            db, out, title=title or "Leaderboard", command=command, rows=row or None, clips=None if clips else {}
        )
    typer.echo(json.dumps({"report": str(page)}) if as_json else str(page))


def _table(rows: list[dict[str, Any]], *, filtered: bool) -> str:
    """The rows as aligned text: settings, then metrics with their intervals, then source and flags.

    Totals come first; without --json the sixteen dimensions are left out where there are totals.
    """
    from leaderboard.checks import DIMENSIONS, TOTALS
    from leaderboard.display import NONE, count

    if not rows and filtered:
        return "no row meets every --where; see all values with: tmd-eval leaderboard show --json"
    if not rows:
        return "no rows; record a run with: tmd-eval leaderboard add RUN"
    found = {name for row in rows for name in row["metrics"]}
    metrics = [name for name in TOTALS if name in found] + sorted(found - set(TOTALS))
    if "total" in found:
        metrics = [name for name in metrics if name not in DIMENSIONS]
    lines = [["id", "name", "method", "M", "N", "H", "NFE", "s/video", *metrics, "source", "flags"]]
    for row in rows:
        scores = []
        for name in metrics:
            metric = row["metrics"].get(name)
            if metric is None:
                scores.append(NONE)
                continue
            digits = 3 if row["source"] == "measured" else 4
            interval = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
            scores.append(f"{metric['value']:.{digits}f}{interval}")
        settings = [count(row[key]) for key in ("m", "n", "h", "effective_nfe", "seconds_per_video")]
        flags = ", ".join(_flag(flag, row) for flag in row["flags"])
        lines.append([str(row["id"]), row["name"], row["method"], *settings, *scores, row["source"], flags])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _flag(flag: str, row: dict[str, Any]) -> str:
    """A flag; a contradiction with what the formula gives."""
    key = {"total_mismatch": "total", "nfe_mismatch": "effective_nfe"}.get(flag)
    return flag if key is None else f"{flag} (formula: {row['formula'][key]:.5g})"
