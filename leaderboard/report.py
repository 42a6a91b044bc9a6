"""The report: index.html (one self-contained file), leaderboard.md, report.json and figures, from the database.

The same rows and clips give the same bytes: nothing in a report says when it was built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaderboard import display, figures
from leaderboard.clips import Sheet, contact_sheet
from leaderboard.display import Display
from leaderboard.errors import LeaderboardError
from leaderboard.models import Metric, Result
from leaderboard.page import environment, write_file
from leaderboard.query import load
from leaderboard.stats import intervals_apart


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student beside the undistilled model at the same M, and the teacher, in one metric."""

    student: Result
    undistilled: Result
    teacher: Result | None
    verdict: str
    """"above", "below" or "not apart": where the student's interval lies."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows on one prompt set: only these are compared with each other."""

    name: str
    slug: str
    rows: list[Result]
    displays: list[Display]
    primary: Display | None
    ranks: dict[int, str]
    figures: list[figures.Figure]
    comparisons: list[Comparison]
    sheet: Sheet | None

    @property
    def headlines(self) -> list[Display]:
        return [shown for shown in self.displays if shown.headline]

    @property
    def details(self) -> list[Display]:
        return [shown for shown in self.displays if not shown.headline]


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
        clips = {result.id: Path(result.run) for result in results if (Path(result.run) / "manifest.jsonl").is_file()}
    names = sorted({result.prompts_name for result in results})
    groups = [
        _group([r for r in results if r.prompts_name == name], name, clips, alone=len(names) == 1) for name in names
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


def _group(results: list[Result], name: str, clips: Mapping[int, Path], *, alone: bool) -> Group:
    shown = display.displays(results)
    primary = display.primary(shown)
    rows = display.ordered(results, primary)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "prompts"
    prefix = "" if alone else f"{slug}-"
    real = _reference(rows)
    by_name = {one.name: one for one in shown}
    fidelity = next((by_name[one] for one in display.FIDELITY if one in by_name), None)
    drawn = [
        figures.against_nfe(rows, primary, name=f"{prefix}quality") if primary else None,
        figures.against_nfe(rows, fidelity, name=f"{prefix}fidelity", real=real) if fidelity else None,
    ]
    return Group(
        name=name,
        slug=slug,
        rows=rows,
        displays=shown,
        primary=primary,
        ranks=display.ranks(rows, primary),
        figures=[figure for figure in drawn if figure is not None],
        comparisons=_comparisons(rows, primary),
        sheet=contact_sheet(_columns(rows), clips),
    )


def _columns(rows: Sequence[Result]) -> list[Result]:
    """Order of the contact sheet: teacher, students, undistilled, each from many to few evaluations."""
    order = {"teacher": 0, "student": 1, "undistilled": 2}
    return sorted(rows, key=lambda row: (order[row.role], -(row.effective_nfe or 0), row.name, row.id))


def _reference(rows: Sequence[Result]) -> Metric | None:
    """Real against real at the largest n among the complete rows."""
    found = [metric for row in rows if row.ranked and (metric := row.metric(display.REAL)) is not None]
    return max(found, key=lambda metric: metric.n, default=None)


def _comparisons(rows: Sequence[Result], primary: Display | None) -> list[Comparison]:
    if primary is None:
        return []
    scored = [row for row in rows if row.ranked and row.metric(primary.name) is not None]
    teacher = next((row for row in scored if row.role == "teacher"), None)
    found = []
    for student in (row for row in scored if row.role == "student"):
        for other in (row for row in scored if row.role == "undistilled" and row.m == student.m):
            a, b = student.metric(primary.name), other.metric(primary.name)
            if a is None or b is None or None in (a.low, a.high, b.low, b.high):
                continue
            apart = intervals_apart((a.low or 0.0, a.high or 0.0), (b.low or 0.0, b.high or 0.0))
            verdict = "not apart" if not apart else "above" if a.value > b.value else "below"
            found.append(Comparison(student=student, undistilled=other, teacher=teacher, verdict=verdict))
    return found


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
