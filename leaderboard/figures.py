"""Figures of a report: a metric against effective NFE, the same bytes for the same rows.

Colours are Okabe and Ito's, safe for colour-blind readers, and every method has its own marker besides. The SVG that
goes into the page takes its colours from the page's CSS, so that it follows light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from leaderboard.display import Display, count, method_key
from leaderboard.models import Metric, Result

INK, MUTED, LINE = "#1b1f24", "#5b6570", "#dde2e7"
_STYLES = {
    "tmd": ("o", "#0072b2"),
    "tm-mf": ("o", "#56b4e9"),
    "dmd2-v": ("^", "#d55e00"),
    "rcm": ("D", "#009e73"),
    "kd": ("v", "#cc79a7"),
}
_OTHERS = (("P", "#e69f00"), ("X", "#e69f00"), ("*", "#e69f00"))
_CSS = {"#ffffff": "var(--card)", INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"} | {
    color: f"var(--c-{color[1:]})" for color in (*(c for _, c in _STYLES.values()), *(c for _, c in _OTHERS))
}
_SETTINGS = {
    "svg.hashsalt": "tmd-eval",
    "svg.fonttype": "none",
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
    """The figure in words, with every number in it."""
    svg: str
    """Stand-alone SVG on white."""
    png: bytes
    """The same as PNG, 200 dots an inch."""

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
        for color, css in _CSS.items():
            svg = svg.replace(color, css)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1)


def against_nfe(results: Sequence[Result], display: Display, *, name: str, real: Metric | None = None) -> Figure | None:
    """A metric against effective NFE: log2 axis, intervals, direct labels, the teacher also as a horizontal band.

    Args:
        results: rows; those incomplete, without the metric or without an effective NFE are left out.
        display: the metric; distances get a logarithmic axis.
        name: file name without ending.
        real: the same metric for real against real, drawn as a dotted line.

    Returns:
        The figure, or None where no row is left.
    """
    points = [
        (result, metric)
        for result in results
        if result.ranked and result.effective_nfe and (metric := result.metric(display.name)) is not None
    ]
    if not points:
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_SETTINGS):
        canvas = Canvas(figsize=(4.7, 3.6), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        _axes(axes, points, display, real)
        _draw(axes, points, display)
        if real is not None:
            axes.axhline(real.value, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        _labels(canvas, axes, points, display, real)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=200, metadata={"Software": None})
    text = "; ".join(
        f"{result.name} at {count(result.effective_nfe)}: {display.number(metric.value)} {display.interval(metric)}"
        for result, metric in points
    )
    reference = f"; real against real: {display.number(real.value)}" if real else ""
    title = f"{display.label}{' (%)' if display.share else ''}"
    return Figure(
        name=name,
        caption=f"{title} against effective NFE (logarithmic), with 95 % intervals. "
        + "The band is the teacher's interval, the dashed line the undistilled model."
        + (" Dotted: real clips against other real clips." if real else ""),
        alt=f"{title} against effective NFE. {text}{reference}.",
        svg=svg.getvalue(),
        png=png.getvalue(),
    )


def _scale(display: Display, value: float) -> float:
    return 100 * value if display.share else value


def _ends(display: Display, metric: Metric) -> tuple[float, float]:
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return _scale(display, low), _scale(display, high)


def _axes(axes: Any, points: Sequence[tuple[Result, Metric]], display: Display, real: Metric | None) -> None:
    nfe = [float(result.effective_nfe or 1) for result, _ in points]
    first, last = math.floor(math.log2(min(nfe))), math.ceil(math.log2(max(nfe)))
    ticks = [2.0**power for power in range(first, max(last, first + 1) + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(nfe) / 1.45, max(max(nfe), ticks[1]) * 1.45)
    axes.set_xticks(ticks, [count(tick) for tick in ticks])
    axes.set_xlabel("Effective NFE")
    ends = [end for _, metric in points for end in _ends(display, metric)]
    if real is not None:
        ends.append(_scale(display, real.value))
    if display.share:
        axes.set_ylabel(f"{display.label}, %")
        if min(ends) >= 50:
            margin = max(0.15 * (max(ends) - min(ends)), 0.5)
            axes.set_ylim(min(ends) - margin, min(max(ends) + margin, 101))
        else:
            axes.set_ylim(0, 104)
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


def _style(result: Result, unknown: Sequence[str]) -> dict[str, Any]:
    if result.role == "teacher":
        return {"marker": "s", "color": INK, "markerfacecolor": INK}
    if result.role == "undistilled":
        return {"marker": "s", "color": MUTED, "markerfacecolor": "white"}
    method = method_key(result.method)
    marker, color = _STYLES.get(method) or _OTHERS[unknown.index(method) % len(_OTHERS)]
    return {"marker": marker, "color": color, "markerfacecolor": color}


def _draw(axes: Any, points: Sequence[tuple[Result, Metric]], display: Display) -> None:
    unknown = sorted({method_key(r.method) for r, _ in points if r.role == "student"} - set(_STYLES))
    for result, metric in points:
        x, y = float(result.effective_nfe or 1), _scale(display, metric.value)
        low, high = _ends(display, metric)
        if result.role == "teacher":
            axes.axhspan(low, high, color=INK, alpha=0.13, linewidth=0, zorder=0)
            axes.axhline(y, color=INK, alpha=0.5, linewidth=0.8, zorder=0)
        style = _style(result, unknown)
        axes.plot([x, x], [low, high], color=style["color"], linewidth=2, solid_capstyle="butt", zorder=3)
        axes.plot([x], [y], linestyle="", markersize=7.5, markeredgewidth=1.6, zorder=4, **style)
    for line in _undistilled(points, display):
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2)


def _undistilled(points: Sequence[tuple[Result, Metric]], display: Display) -> list[list[tuple[float, float]]]:
    """For each base model, (effective NFE, value) of the same weights at fewer and fewer steps."""
    lines: dict[str | None, list[tuple[float, float]]] = {}
    for result, metric in points:
        if result.role != "student":
            place = (float(result.effective_nfe or 1), _scale(display, metric.value))
            lines.setdefault(result.base, []).append(place)
    return [sorted(line) for line in lines.values() if len(line) > 1]


def _labels(
    canvas: Any, axes: Any, points: Sequence[tuple[Result, Metric]], display: Display, real: Metric | None
) -> None:
    """Names beside their points, each at the place around it where it covers least."""
    renderer = canvas.canvas.get_renderer()
    canvas.draw_without_rendering()
    pixels = canvas.dpi / 72
    frame = axes.get_window_extent(renderer)
    taken: list[tuple[float, float, float, float]] = []
    for result, metric in points:
        x = float(result.effective_nfe or 1)
        low, high = (axes.transData.transform((x, end)) for end in _ends(display, metric))
        middle = axes.transData.transform((x, _scale(display, metric.value)))
        reach = 6 * pixels
        taken.append((middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach))
        taken.append((low[0] - pixels, low[1], low[0] + pixels, high[1]))
        if result.role == "teacher":
            taken.append((frame.x0, middle[1] - 2 * pixels, frame.x1, middle[1] + 2 * pixels))
    for line in _undistilled(points, display):
        ends = axes.transData.transform(line)
        for begin, end in pairwise(ends):
            steps = [begin + (end - begin) * i / 60 for i in range(61)]
            taken += [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in steps]
    for result, metric in sorted(points, key=lambda point: (-float(point[0].effective_nfe or 1), point[0].name)):
        place = (float(result.effective_nfe or 1), _scale(display, metric.value))
        tried = []
        for rank, (dx, dy, horizontal, vertical) in enumerate(_PLACES):
            label = axes.annotate(
                _shortened(result.name),
                place,
                xytext=(dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=10,
                zorder=5,
            )
            box = label.get_window_extent(renderer).extents
            cost = sum(_overlap(box, other) for other in taken) + 20 * (_area(box) - _overlap(box, frame.extents))
            tried.append((cost, rank, label, tuple(box)))
        best = min(tried, key=lambda option: option[:2])
        for option in tried:
            if option is not best:
                option[2].remove()
        taken.append(best[3])
    if real is not None:
        axes.annotate(
            "real vs real",
            (1, _scale(display, real.value)),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color=MUTED,
        )


_PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (7, 8, "left", "bottom"),
    (-7, 8, "right", "bottom"),
    (7, -8, "left", "top"),
    (-7, -8, "right", "top"),
    (0, 20, "center", "bottom"),
    (0, -20, "center", "top"),
)
"""Where a label may stand around its point, points: offset and alignment, best first."""


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}\u2026"


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return float(max(width, 0) * max(height, 0))
