"""The board of published figures: figures by base model, what contradicts itself, and who disagrees with whom."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leaderboard import figures, published
from leaderboard.board import slug
from leaderboard.checks import DIMENSIONS, TOTALS
from leaderboard.display import Display
from leaderboard.figures import Figure, Point
from leaderboard.marks import family
from leaderboard.models import Reported

LEAST = 5
"""Rows with a total that a base model needs for figures of its own."""
_DISPLAYS = {name: Display(name=name, label=name.capitalize()) for name in TOTALS}


@dataclass(frozen=True, kw_only=True)
class ReportedModel:
    """Everything printed about one method on one base model: a page of its own."""

    name: str
    slug: str
    rows: list[Reported]


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """One model at one number of steps, printed with different figures of one score in different places."""

    name: str
    score: str
    """"total", or a dimension of VBench."""
    rows: list[Reported]

    @property
    def spread(self) -> float:
        """Percent between the highest and the lowest figure."""
        figures = [row.scores[self.score] for row in self.rows]
        return max(figures) - min(figures)


def models(rows: Sequence[Reported]) -> list[ReportedModel]:
    """The rows by base model and method, in the order in which they first appear."""
    found: dict[tuple[str, str], list[Reported]] = {}
    for row in rows:
        found.setdefault((row.teacher, row.method), []).append(row)
    slugs: set[str] = set()
    pages = []
    for (teacher, method), entries in found.items():
        name = f"{teacher} {method}"
        first = candidate = f"reported-{slug(name)}"
        number = 1
        while candidate in slugs:
            number += 1
            candidate = f"{first}-{number}"
        slugs.add(candidate)
        pages.append(ReportedModel(name=name, slug=candidate, rows=entries))
    return pages


def ordered(rows: Sequence[Reported]) -> list[Reported]:
    """By total, highest first, as the papers' tables invite to read; no rank, since no source gives an interval."""
    return sorted(rows, key=lambda row: (-row.scores.get("total", -1.0), row.id))


def disagreements(rows: Sequence[Reported]) -> list[Disagreement]:
    """Models printed with figures of a score that differ by more than rounding: totals first, the widest first.

    A teacher's steps are its own, so its rows are compared whether a source says the steps or not.
    """
    found: dict[tuple[str, str, str, int | None], list[Reported]] = {}
    for row in rows:
        steps = None if row.method == "teacher" else row.m
        for score in ("total", *DIMENSIONS):
            if score in row.scores:
                found.setdefault((score, row.teacher, row.method, steps), []).append(row)
    cases = [
        Disagreement(name=f"{teacher} {method}" + ("" if m is None else f", M = {m}"), score=score, rows=entries)
        for (score, teacher, method, m), entries in found.items()
    ]
    apart = [case for case in cases if case.spread > published.TOTAL_TOLERANCE]
    return sorted(apart, key=lambda case: (case.score != "total", -case.spread, case.name))


def reported_figures(rows: Sequence[Reported]) -> list[Figure]:
    """Total, quality and semantic score against effective NFE, for every base model with enough rows."""
    drawn = []
    for teacher in sorted({row.teacher for row in rows}):
        own = [row for row in rows if row.teacher == teacher]
        if sum("total" in row.scores and row.effective_nfe is not None for row in own) < LEAST:
            continue
        for metric in TOTALS:
            points = _points(own, metric)
            name = f"reported-{slug(teacher)}-{metric}"
            figure = figures.against(points, _DISPLAYS[metric], name=name, title=teacher, cut=True)
            if figure is not None:
                drawn.append(figure)
    return drawn


def _points(rows: Sequence[Reported], metric: str) -> list[Point]:
    """One point for each printed figure; what is printed twice is drawn once, ablations are dots.

    Points of one method in one source are joined and share one label, at the one with the most evaluations.
    """
    found: dict[tuple[str, float, float], Point] = {}
    most: dict[str, float] = {}
    main = Counter(_place(row.source) for row in rows).most_common(1)[0][0]
    for row in rows:
        if row.effective_nfe is None or metric not in row.scores:
            continue
        ablation = row.note.startswith("ablation")
        score, place = row.scores[metric], _place(row.source)
        label = row.method if place == main or place in row.method else f"{row.method} ({place})"
        key = (family(row.method.split(" as reported by ")[0]), row.effective_nfe, score)
        if key not in found or (found[key].faint and not ablation):
            found[key] = Point(
                label=label,
                x=row.effective_nfe,
                y=score,
                low=score,
                high=score,
                role="teacher" if row.method == "teacher" else "student",
                method=row.method,
                line=None if ablation or row.method == "teacher" else label,
                faint=ablation,
            )
    for point in found.values():
        most[point.label] = max(most.get(point.label, 0.0), point.x)
    return [replace(point, named=most[point.label] == point.x) for point in found.values()]


def _place(source: str) -> str:
    """A source in a word: what stands in brackets, else the text before the table."""
    named = re.search(r"\(([^)]+)\)", source)
    return named[1] if named else re.sub(r" (Table|issue) .*| README", "", source)
