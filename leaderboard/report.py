"""The report: index.html (one self-contained file), leaderboard.md, report.json and figures, from the database.

The same rows and clips give the same bytes: nothing in a report says when it was built.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leaderboard import display, figures
from leaderboard.board import Group, columns, groups_of, reference
from leaderboard.clips import contact_sheet
from leaderboard.errors import LeaderboardError
from leaderboard.figures import Figure
from leaderboard.models import Result
from leaderboard.page import environment, write_file
from leaderboard.query import load


def build_report(
    db_url: str | None,
    out: Path,
    *,
    title: str = "Leaderboard",
    command: str,
    rows: Iterable[int] | None = None,
    clips: Mapping[int, Path] | None = None,
) -> Path:
    """Write a report folder; files of an older report in it are replaced.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        out: the folder, made when missing.
        title: heading of the page.
        command: command line that makes this report again.
        rows: ids of the rows to show; all by default.
        clips: run folder by row id for the contact sheet; by default those recorded, where they still exist. An empty
            mapping leaves the sheet out.

    Returns:
        Path of index.html.

    Raises:
        LeaderboardError: no rows, an unknown id, or a clip that cannot be read.
    """
    results = load(db_url, rows=rows)
    if not results:
        raise LeaderboardError(
            "There is nothing to report: the database has no rows; record some with leaderboard add."
        )
    if clips is None:
        clips = {
            result.id: Path(result.run)
            for result in results
            if result.run and (Path(result.run) / "manifest.jsonl").is_file()
        }
    groups = groups_of(results)
    groups = [
        replace(
            group,
            figures=_figures(group, "" if len(groups) == 1 else f"{group.slug}-"),
            sheet=contact_sheet(columns(group.rows), clips),
        )
        for group in groups
    ]
    shown = [row for group in groups for row in group.rows]
    context = {
        "title": title,
        "command": command,
        "groups": groups,
        "results": shown,
        "metrics": {metric.name for result in results for metric in result.metrics},
        "devices": _distinct(result.device for result in results),
        "revisions": _distinct(result.code_revision for result in results),
    }
    templates = environment()
    page = templates.get_template("index.html.j2").render(context)
    table = templates.get_template("leaderboard.md.j2").render(context)
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(exist_ok=True)
    for figure in (figure for group in groups for figure in group.figures):
        write_file(out / "figures" / f"{figure.name}.svg", figure.svg)
        write_file(out / "figures" / f"{figure.name}.png", figure.png)
    write_file(out / "leaderboard.md", table)
    summary = report_json(shown, command=command)
    write_file(out / "report.json", json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(out / "index.html", page)
    return out / "index.html"


def report_json(results: Sequence[Result], *, command: str) -> dict[str, Any]:
    """The content of report.json, a contract: other programs and ``tmd-eval rerun`` read it.

    Args:
        results: in the order of the report.
        command: command line that makes the report again.
    """
    return {
        "command": command,
        "code_revision": ", ".join(_distinct(result.code_revision for result in results)),
        "device": ", ".join(_distinct(result.device for result in results)),
        "seeds": sorted({seed for result in results for seed in result.seeds}),
        "rows": [
            {
                **{key: getattr(result, key) for key in ("name", "role", "method", "m", "n", "h")},
                "effective_nfe": result.effective_nfe,
                "seconds_per_video": result.seconds_per_video,
                "metrics": {
                    metric.name: {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}
                    for metric in result.metrics
                },
            }
            for result in results
        ],
    }


def _figures(group: Group, prefix: str) -> list[Figure]:
    by_name = {shown.name: shown for shown in group.displays}
    fidelity = next((by_name[name] for name in display.FIDELITY if name in by_name), None)
    drawn = []
    if group.primary:
        drawn.append(
            figures.against(figures.points_of(group.rows, group.primary), group.primary, name=f"{prefix}quality")
        )
    if fidelity:
        points, real = figures.points_of(group.rows, fidelity), reference(group.rows)
        drawn.append(figures.against(points, fidelity, name=f"{prefix}fidelity", real=real))
    return [figure for figure in drawn if figure is not None]


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
