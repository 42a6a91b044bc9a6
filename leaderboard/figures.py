"""Figures of a report: a metric against compute, the same bytes for the same rows.

The SVG that goes into the page takes its colours from the page's CSS, so that it follows light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from leaderboard.display import Display, count, seconds
from leaderboard.labels import place_labels
from leaderboard.marks import INK, LINE, MUTED, OTHERS, STYLES, draw_mark, family, style
from leaderboard.models import Metric, Result
from leaderboard.stats import on_front, score_draws

DRAWN = 60
"""Points with marker and interval, at most; the rest of a large board are dots."""
LABELLED = 16
"""Points with a label, at most."""
_CSS = {"#ffffff": "var(--card)", INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    color: f"var(--c-{color[1:]})" for color in (*(c for _, c in STYLES.values()), *(c for _, c in OTHERS))
}
_SETTINGS = {
    "svg.hashsalt": "tmd-eval",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names are names, whatever dollar signs they hold
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One drawn figure."""

    name: str
    """File name without ending."""
    caption: str
    """What it shows, one or two sentences."""
    alt: str
    """The figure in words, with every number in it (of a large board, those that have a label)."""
    svg: str
    """Stand-alone SVG on white."""
    png: bytes
    """The same as PNG, 200 dots an inch."""
    pdf: bytes
    """The same as PDF."""

    @property
    def inline(self) -> str:
        """The SVG for a page: colours from its CSS, no namespaces or metadata, ids of its own."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
        svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
        svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
        svg = svg.replace("'DejaVu Sans'", "inherit")
        svg = re.sub(r"\n\s*", "\n", svg)
        for color, css in _CSS.items():
            svg = svg.replace(color, css)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1)


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of a size in inches, with this project's settings."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_SETTINGS):
        drawing = Canvas(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        yield drawing


def finish(drawing: Any, *, name: str, caption: str, alt: str) -> Figure:
    """The figure in its three formats, without dates or versions."""
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")  # the layout is found; each format would look for it again
    svg, png, pdf = io.StringIO(), io.BytesIO(), io.BytesIO()
    drawing.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    drawing.savefig(png, format="png", dpi=200, metadata={"Software": None})
    drawing.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return Figure(name=name, caption=caption, alt=alt, svg=svg.getvalue(), png=png.getvalue(), pdf=pdf.getvalue())


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row in a figure, on the scale shown (percent for shares)."""

    label: str
    x: float
    y: float
    low: float
    """Ends of the interval; both ``y`` where there is none."""
    high: float
    role: str
    method: str
    line: str | None = None
    """Points of one line are joined; None stands alone."""
    named: bool = True
    """Whether it may have a label."""
    short: str = ""
    """Its label in the figure, where that is not ``label``."""
    digit: str = ""
    """A character within the mark."""
    hollow: bool = False
    """Its mark is an outline."""
    faint: bool = False
    """Drawn as a dot without a label."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The axis of compute."""

    label: str
    """Heading."""
    text: str
    """What it is called within a sentence."""
    tick: Callable[[float], str]
    base: int
    """Base of the logarithm."""


NFE = Axis(label="Effective NFE", text="effective NFE", tick=count, base=2)


def latency_axis(device: str) -> Axis:
    """Seconds for one video on one device."""
    return Axis(label=f"Seconds / video, {device}", text=f"measured seconds a video on {device}", tick=seconds, base=10)


def points_of(
    results: Sequence[Result], display: Display, x: Callable[[Result], float | None] = lambda row: row.effective_nfe
) -> list[Point]:
    """Points of measured rows; those incomplete, without the metric or without a position are left out."""
    found = []
    for row in results:
        metric, place = row.metric(display.name), x(row)
        if not row.ranked or metric is None or not place:
            continue
        low, high = _ends(display, metric)
        found.append(
            Point(
                label=row.name,
                x=float(place),
                y=_scale(display, metric.value),
                low=low,
                high=high,
                role=row.role,
                method=row.method,
                line=None if row.role == "student" else row.base or "",
            )
        )
    return found


def against(
    points: Sequence[Point],
    display: Display,
    *,
    name: str,
    axis: Axis = NFE,
    real: Metric | None = None,
    title: str = "",
    cut: bool = False,
    size: tuple[float, float] = (4.7, 3.6),
) -> Figure | None:
    """A metric against compute: log axis, intervals, Pareto step, direct labels, the teacher also as a band.

    Args:
        points: rows on the scale shown.
        display: the metric; distances get a logarithmic axis.
        name: file name without ending.
        axis: what x is.
        real: the same metric for real against real, drawn as a dotted line.
        title: heading above the figure, such as the base model.
        cut: leave the teachers' place on the axis out, for the space of the others; their height stays as a line.
        size: width and height in inches.

    Returns:
        The figure, or None where there is no point.
    """
    teachers = [p for p in points if p.role == "teacher"] if cut else []
    points = [p for p in points if p not in teachers]
    if not points:
        return None
    sign = -1 if display.better == "lower" else 1
    front = on_front([p.x for p in points], [sign * p.y for p in points])
    best = np.lexsort((np.arange(len(points)), -sign * np.array([p.y for p in points]), ~front))
    chosen = {int(i) for i in best[:DRAWN]} | {i for i, p in enumerate(points) if p.role == "teacher" and i in best[:9]}
    drawn = [p for i, p in enumerate(points) if i in chosen and not p.faint]
    dots = [p for i, p in enumerate(points) if i not in chosen or p.faint]
    named = [p for i in best if (p := points[int(i)]) in drawn and p.named][:LABELLED]
    certain = [p for p in drawn if p.low < p.high]
    with canvas(*size) as drawing:
        axes = drawing.add_subplot()
        _axes(axes, points, display, axis, real, [p.y for p in teachers])
        axes.set_title(title, fontsize=11, loc="left")
        if teachers:  # room above for the labels, since students crowd at the top
            bottom, top = axes.get_ylim()
            axes.set_ylim(bottom, min(top + 0.2 * (top - bottom), 104 if display.share else math.inf))
        for p in teachers:
            axes.axhline(p.y, color=INK, alpha=0.6, linewidth=1.2, zorder=0)
            text = f"{p.label} at {axis.tick(p.x)}"
            axes.annotate(
                text, (0, p.y), xycoords=("axes fraction", "data"), xytext=(4, 2), textcoords="offset points",
                ha="left", va="bottom", fontsize=9.5,
            )  # fmt: skip
        axes.scatter([p.x for p in dots], [p.y for p in dots], s=9, color=MUTED, alpha=0.55, linewidths=0, zorder=1)
        _step(axes, drawn, certain, sign)
        _draw(axes, drawn)
        if real is not None:
            axes.axhline(_scale(display, real.value), color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        place_labels(drawing, axes, named, drawn, lines(drawn))
        if real is not None:
            axes.annotate(
                "real vs real", (1, _scale(display, real.value)), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", va="bottom", fontsize=9, color=MUTED,
            )  # fmt: skip
        what = f"{title}: " * bool(title) + f"{display.label}{' (%)' if display.share else ''}"
        caption = f"{what} against {axis.text} (logarithmic){', with 95 % intervals' if certain else ''}."
        if any(p.role == "teacher" for p in certain):
            caption += " The grey band is the teacher's interval."
        if any(len(line) > 1 and line[0].role != "student" for line in lines(drawn)):
            caption += " The dashed line joins the undistilled model."
        if teachers:
            caption += f" The line is the teacher, whose {axis.text} lies off the axis."
        if len(drawn) > 2:
            caption += " The step is the Pareto front" + (
                ", its shade where 95 % of resampled fronts lie." if len(certain) > 2 else "."
            )
        if dots:
            caption += f" Dots: {len(dots)} more rows, in the table."
        if real is not None:
            caption += " Dotted: real clips against other real clips."
        ranges = {p: f" [{_number(display, p.low)}, {_number(display, p.high)}]" for p in certain}
        text = "; ".join(
            f"{p.label} at {axis.tick(p.x)}: {_number(display, p.y)}{ranges.get(p, '')}"
            for p in sorted([*(named if dots or len(drawn) > 40 else drawn), *teachers], key=lambda p: (p.x, p.label))
        )
        reference = f"; real against real: {display.number(real.value)}" if real else ""
        return finish(drawing, name=name, caption=caption, alt=f"{what} against {axis.text}. {text}{reference}.")


def lines(points: Sequence[Point]) -> list[list[Point]]:
    """Points that are joined, each line by position."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.line is not None:
            found.setdefault(point.line, []).append(point)
    return [sorted(line, key=lambda p: p.x) for line in found.values() if len(line) > 1]


def _number(display: Display, shown: float) -> str:
    return display.number(shown / 100 if display.share else shown)


def _scale(display: Display, value: float) -> float:
    return 100 * value if display.share else value


def _ends(display: Display, metric: Metric) -> tuple[float, float]:
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return _scale(display, low), _scale(display, high)


def _axes(
    axes: Any, points: Sequence[Point], display: Display, axis: Axis, real: Metric | None, also: Sequence[float]
) -> None:
    positions = [p.x for p in points]
    low, high = min(positions), max(positions)
    if axis.base == 2:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        ticks = [2.0**power for power in range(first, max(last, first + 1) + 1)]
    else:
        steps = (1, 3) if high > 10 * low else (1, 2, 5) if high > 3 * low else (1, 1.5, 2, 3, 5, 7)
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
    left, right = low / 1.45, max(high, low * 2) * 1.45
    axes.set_xscale("log", base=axis.base)
    axes.set_xlim(left, right)
    shown = [tick for tick in ticks if left <= tick <= right]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xlabel(axis.label if len(axis.label) <= 48 else f"{axis.label[:47]}\u2026")
    ends = [*also, *(end for p in points for end in (p.low, p.high))]
    if real is not None:
        ends.append(_scale(display, real.value))
    if display.share:
        axes.set_ylabel(f"{display.label}, %")
        if min(ends) >= 50:
            margin = max(0.15 * (max(ends) - min(ends)), 0.5)
            axes.set_ylim(min(ends) - margin, min(max(ends) + margin, 101))
        else:
            axes.set_ylim(-2, 104)  # room for a point at 0
            axes.set_yticks(range(0, 101, 20))
    else:
        axes.set_ylabel(f"{display.label}{' (lower is better)' if display.better == 'lower' else ''}")
        if min(ends) > 0:
            axes.set_yscale("log")
            axes.set_ylim(min(ends) / 1.5, max(ends) * 1.5)
            _log_ticks(axes)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.minorticks_off()


def _log_ticks(axes: Any) -> None:
    """Ticks at 1, 2, 5 times powers of ten (over more than two decades at powers of ten alone), in plain figures."""
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _step(axes: Any, points: Sequence[Point], certain: Sequence[Point], sign: int) -> None:
    """The Pareto front as a step, and where 95 % of the fronts of resampled scores lie."""
    if len(points) < 3:
        return
    right = axes.get_xlim()[1]
    ordered = sorted(points, key=lambda p: (p.x, -sign * p.y))
    best = sign * np.maximum.accumulate([sign * p.y for p in ordered])
    places = [p.x for p in ordered]
    axes.step([*places, right], [*best, best[-1]], where="post", color=INK, linewidth=0.9, alpha=0.55, zorder=2)
    if len(certain) > 2:
        ordered = sorted(certain, key=lambda p: p.x)
        draws = score_draws([sign * p.y for p in ordered], [p.low for p in ordered], [p.high for p in ordered])
        low, high = sign * np.quantile(np.maximum.accumulate(draws, axis=1), [0.025, 0.975], axis=0)
        axes.fill_between(
            [*(p.x for p in ordered), right], [*low, low[-1]], [*high, high[-1]], step="post", color=INK, alpha=0.07,
            linewidth=0, zorder=0,
        )  # fmt: skip


def _draw(axes: Any, points: Sequence[Point]) -> None:
    unknown = sorted({family(p.method) for p in points if p.role == "student"} - set(STYLES))
    for point in points:
        if point.role == "teacher" and point.low < point.high:
            axes.axhspan(point.low, point.high, color=INK, alpha=0.13, linewidth=0, zorder=0)
        if point.role == "teacher":
            axes.axhline(point.y, color=INK, alpha=0.5, linewidth=0.8, zorder=0)
        look = style(point.role, point.method, unknown)
        if point.low < point.high:
            ends = [point.low, point.high]
            axes.plot([point.x] * 2, ends, color=look["color"], linewidth=2, solid_capstyle="butt", zorder=3)
        draw_mark(axes, point, unknown)
    for line in lines(points):
        undistilled = line[0].role != "student"
        color = MUTED if undistilled else style("student", line[0].method, unknown)["color"]
        axes.plot(
            [p.x for p in line], [p.y for p in line], color=color, linewidth=1, alpha=1 if undistilled else 0.6,
            linestyle=(0, (4, 3)) if undistilled else "-", zorder=2,
        )  # fmt: skip
