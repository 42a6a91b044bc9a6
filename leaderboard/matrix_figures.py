"""Figures of a matrix report: quality against compute for each budget, and diversity against quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from leaderboard import figures
from leaderboard.display import Display, method_label
from leaderboard.figures import Figure, Point
from leaderboard.labels import place_labels
from leaderboard.marks import LINE, MUTED, draw_mark, family, style
from leaderboard.matrix import Matrix, MatrixRow

LABELLED = 12
"""Rows with a label in the figure of diversity, at most."""


def against_nfe(rows: Sequence[MatrixRow], display: Display, *, name: str) -> Figure | None:
    """A metric against effective NFE, intervals over seeds and prompts.

    Rows that differ in M alone are one line with one label, at its best point; the digit in a mark is M.

    Args:
        rows: those of one table.
        display: the metric.
        name: file name without ending.
    """
    places = {row.key: row.metric(display.name) for row in rows if row.effective_nfe}
    series: dict[str, list[MatrixRow]] = {}
    for row in rows:
        if places.get(row.key) is not None:
            series.setdefault(_series(row), []).append(row)
    points = []
    for label, line in series.items():
        last = max(line, key=lambda row: row.effective_nfe or 0.0)
        for row in line:
            metric = places[row.key]
            assert metric is not None and row.effective_nfe is not None
            value, low, high = _shown(display, (metric.value, metric.low, metric.high))
            points.append(
                Point(
                    label=row.name, short=label, x=row.effective_nfe, y=value, low=low, high=high, role=row.role,
                    method=row.method, line="base" if row.role != "student" else label, named=row is last,
                    digit=str(row.m) if row.m < 10 else "",
                )
            )  # fmt: skip
    figure = figures.against(points, display, name=name, size=(5.6, 4.4))
    return figure and replace(figure, caption=f"{figure.caption} The digit in a mark is M.")


def diversity_against(matrix: Matrix, display: Display, diversity: Display, *, name: str) -> Figure | None:
    """Diversity against quality, with both intervals: collapse is what lies low, whatever its quality.

    Names stand at the base model and at ablations whose diversity surely differs from that of their baseline, and at
    these baselines; a legend tells the methods, the digit in a mark is M.

    Args:
        matrix: the content of the report; rows of the first budget are drawn.
        display: metric of the x axis.
        diversity: metric of the y axis.
        name: file name without ending.
    """
    points, across = [], []
    named = _named(matrix, diversity.name)
    for row in matrix.rows:
        x, y = row.metric(display.name), row.metric(diversity.name)
        if x is not None and y is not None and row.budget in (None, *matrix.budgets[:1]):
            at, left, right = _shown(display, (x.value, x.low, x.high))
            up, low, high = _shown(diversity, (y.value, y.low, y.high))
            points.append(
                Point(
                    label=row.name, x=at, y=up, low=low, high=high, role=row.role, method=row.method,
                    digit=str(row.m) if row.m < 10 else "", named=row.key in named, hollow=row.ablation is not None,
                )
            )  # fmt: skip
            across.append((left, right))
    if len(points) < 2:
        return None
    unknown = sorted({family(p.method) for p in points if p.role == "student"})
    with figures.canvas(7.2, 4.4) as drawing:
        axes = drawing.add_subplot()
        spans = []
        for point, (left, right) in zip(points, across, strict=True):
            color = style(point.role, point.method, unknown)["color"]
            axes.plot([left, right], [point.y] * 2, color=color, linewidth=1, alpha=0.55, zorder=2)
            axes.plot([point.x] * 2, [point.low, point.high], color=color, linewidth=1.6, zorder=3)
            draw_mark(axes, point, unknown)
            spans.append([replace(point, x=left), replace(point, x=right)])
        axes.axhline(1.0, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        axes.set_xlabel(f"{display.label}{', %' if display.share else ''}")
        axes.set_ylabel(diversity.label)
        axes.margins(0.08)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        _legend(axes, points, unknown)
        # The teacher's line across the axes is for figures against compute.
        drawn = [replace(p, role="student") for p in points]
        place_labels(drawing, axes, [p for p in drawn if p.named][:LABELLED], drawn, spans)
        text = "; ".join(
            f"{p.label}: {display.number(p.x / (100 if display.share else 1))} and {diversity.number(p.y)}"
            for p in points
        )
        caption = (
            f"{diversity.label} against {display.phrase}, with 95 % intervals over seeds and prompts. Dotted: as "
            "diverse as real clips. The digit in a mark is M; hollow student marks are ablations, with a name where "
            "their diversity surely differs from that of the method as it is. What lies low has collapsed, wherever it "
            "lies from left to right."
        )
        alt = f"{diversity.label} against {display.phrase}. {text}."
        return figures.finish(drawing, name=name, caption=caption, alt=alt)


def _named(matrix: Matrix, metric: str) -> set[str]:
    """Keys of the base model's rows, of ablations that surely differ in a metric, and of their baselines."""
    keys = {row.key for row in matrix.rows if row.role != "student"}
    for row in matrix.rows:
        effect = matrix.difference(row, metric) if row.ablation else None
        if effect is not None and effect.over_seeds and (effect.low > 0 or effect.high < 0):
            keys |= {row.key, str(row.baseline)}
    return keys


def _legend(axes: Any, points: Sequence[Point], unknown: Sequence[str]) -> None:
    """A mark for each method, below the axes' right corner."""
    from matplotlib.lines import Line2D

    families = {family(p.method): p.method for p in points if p.role == "student"}
    handles = [
        Line2D([], [], linestyle="", markersize=7, label=method_label(known), **style("student", method, unknown))
        for known, method in sorted(families.items())
    ]
    if handles:
        axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=10)


def _series(row: MatrixRow) -> str:
    """A row's name without M."""
    if row.role != "student":
        return row.name.split(",")[0] if row.role == "undistilled" else row.name
    return row.name.replace(f", M = {row.m}", "", 1)


def _shown(
    display: Display, values: tuple[float, float | None, float | None]
) -> tuple[float, float, float]:  # fmt: skip
    value, low, high = values
    scale = 100.0 if display.share else 1.0
    return scale * value, scale * (value if low is None else low), scale * (value if high is None else high)
