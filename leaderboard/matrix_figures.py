"""Figures of a matrix report: quality against compute for each budget, and diversity against quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from leaderboard import figures
from leaderboard.display import Display
from leaderboard.figures import Figure, Point
from leaderboard.labels import place_labels
from leaderboard.matrix import MatrixRow

LABELLED = 14
"""Rows with a label in the figure of diversity, at most: ablations first, then the least diverse."""


def against_nfe(rows: Sequence[MatrixRow], display: Display, *, name: str) -> Figure | None:
    """A metric against effective NFE, intervals over seeds and prompts.

    Args:
        rows: those of one table, without ablations.
        display: the metric.
        name: file name without ending.
    """
    points = []
    for row in rows:
        metric = row.metric(display.name)
        if metric is None or not row.effective_nfe:
            continue
        value, low, high = _shown(display, (metric.value, metric.low, metric.high))
        line = None if row.role == "student" else "base"
        points.append(
            Point(
                label=row.name, x=row.effective_nfe, y=value, low=low, high=high, role=row.role, method=row.method,
                line=line,
            )
        )  # fmt: skip
    return figures.against(points, display, name=name)


def diversity_against(rows: Sequence[MatrixRow], display: Display, diversity: Display, *, name: str) -> Figure | None:
    """Diversity against quality, with both intervals: collapse is what lies low, whatever its quality.

    Args:
        rows: any rows.
        display: metric of the x axis.
        diversity: metric of the y axis.
        name: file name without ending.
    """
    places = []
    for row in rows:
        x, y = row.metric(display.name), row.metric(diversity.name)
        if x is not None and y is not None:
            across = _shown(display, (x.value, x.low, x.high))
            places.append((row, across, _shown(diversity, (y.value, y.low, y.high))))
    if len(places) < 2:
        return None
    unknown = sorted({figures.family(row.method) for row, *_ in places if row.role == "student"})
    with figures.canvas(7.2, 4.4) as drawing:
        axes = drawing.add_subplot()
        points = []
        for row, (at, left, right), (up, low, high) in places:
            style = figures.style(row.role, row.method, unknown)
            color = style["color"]
            axes.plot([left, right], [up, up], color=color, linewidth=1, alpha=0.55, zorder=2)
            axes.plot([at, at], [low, high], color=color, linewidth=1.6, zorder=3)
            marks = {**style, "markerfacecolor": "white"} if row.ablation else style
            axes.plot([at], [up], linestyle="", markersize=7, markeredgewidth=1.5, zorder=4, **marks)
            points.append(
                Point(label=row.name, x=at, y=up, low=low, high=high, role="student", method=row.method, line=None)
            )
        axes.axhline(1.0, color=figures.MUTED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        axes.set_xlabel(f"{display.label}{', %' if display.share else ''}")
        axes.set_ylabel(diversity.label)
        axes.margins(0.12)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=figures.LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        order = sorted(range(len(points)), key=lambda i: (places[i][0].ablation is None, points[i].y))
        spans = [
            [replace(p, x=left), replace(p, x=right)]
            for p, (_, (_, left, right), _) in zip(points, places, strict=True)
        ]
        place_labels(drawing, axes, [points[i] for i in order[:LABELLED]], points, spans)
        text = "; ".join(
            f"{row.name}: {display.number(_value(row, display))} and {diversity.number(_value(row, diversity))}"
            for row, *_ in places
        )
        caption = (
            f"{diversity.label} against {display.label}, with 95 % intervals over seeds and prompts. Dotted: as "
            "diverse as real clips. Hollow student marks are ablations. What lies low has collapsed, wherever it lies "
            "from left to right."
        )
        alt = f"{diversity.label} against {display.label}. {text}."
        return figures.finish(drawing, name=name, caption=caption, alt=alt)


def _shown(
    display: Display, values: tuple[float, float | None, float | None]
) -> tuple[float, float, float]:  # fmt: skip
    value, low, high = values
    scale = 100.0 if display.share else 1.0
    return scale * value, scale * (value if low is None else low), scale * (value if high is None else high)


def _value(row: MatrixRow, display: Display) -> float | None:
    metric = row.metric(display.name)
    return None if metric is None else metric.value
