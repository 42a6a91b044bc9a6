"""Figures over many scores at once: the sixteen dimensions as dots and as a radar, and preferences as bars."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from leaderboard.checks import DIMENSIONS, QUALITY_DIMENSIONS
from leaderboard.figures import Figure, canvas, finish
from leaderboard.marks import INK, LINE, MUTED, STYLES, family, style
from leaderboard.models import Preference, Result

SHOWN = 6
"""Rows in a dimension figure, at most: more cannot be told apart."""
LABELS = {name: name.replace("_", " ").capitalize().replace("Color", "Colour") for name in DIMENSIONS}


def dimension_rows(rows: Sequence[Result]) -> list[Result]:
    """The rows that the figures of dimensions show: ranked ones with three dimensions or more, in the order given."""
    return [row for row in rows if row.ranked and sum(row.metric(name) is not None for name in DIMENSIONS) >= 3][:SHOWN]


def _looks(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """Marker and colour of every row; rows of one method differ in how their markers are filled."""
    unknown = sorted({family(row.method) for row in rows if row.role == "student"} - set(STYLES))
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for row in rows:
        look = style(row.role, row.method, unknown)
        kind = (look["marker"], look["markerfacecolor"])
        fill = _FILLS[seen[kind] % len(_FILLS)]
        seen[kind] += 1
        if fill == "none":
            look |= {"markerfacecolor": "#ffffff" if kind[1] == look["color"] else look["color"]}
        elif fill != "full":
            look |= {"fillstyle": fill, "markerfacecolor": look["color"], "markerfacecoloralt": "#ffffff"}
        found.append(look)
    return found


_FILLS = ("full", "none", "left", "right", "top", "bottom")
"""How the first, second ... marker of one shape and colour is filled."""


def dots(rows: Sequence[Result], *, name: str) -> Figure | None:
    """Every dimension a line, every row a marker with its interval; quality above, semantic below.

    Args:
        rows: as ``dimension_rows`` gives them.
        name: file name without ending.

    Returns:
        The figure, or None without rows.
    """
    if not rows:
        return None
    looks = _looks(rows)
    with canvas(6.4, 6.6) as drawing:
        axes = drawing.add_subplot()
        words = []
        for place, dimension in enumerate(DIMENSIONS):
            base = place + (0.6 if dimension not in QUALITY_DIMENSIONS else 0)
            values = []
            for i, (row, look) in enumerate(zip(rows, looks, strict=True)):
                metric = row.metric(dimension)
                if metric is None:
                    continue
                y = base + (i - (len(rows) - 1) / 2) * 0.13
                if metric.low is not None and metric.high is not None:
                    axes.plot([100 * metric.low, 100 * metric.high], [y, y], color=look["color"], linewidth=1.6)
                axes.plot([100 * metric.value], [y], linestyle="", markersize=5.5, markeredgewidth=1.3, **look)
                values.append(f"{row.name} {100 * metric.value:.1f}")
            words.append(f"{LABELS[dimension]}: {', '.join(values) if values else 'not measured'}")
        ticks = [place + (0.6 if name not in QUALITY_DIMENSIONS else 0) for place, name in enumerate(DIMENSIONS)]
        axes.set_yticks(ticks, [LABELS[name] for name in DIMENSIONS])
        axes.invert_yaxis()
        axes.set_xlabel("Score, %")
        axes.set_xlim(min(0, axes.get_xlim()[0]), 101)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.legend(
            handles=[
                axes.plot([], [], linestyle="", markersize=6, label=row.name, **look)[0]
                for row, look in zip(rows, looks, strict=True)
            ],
            loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False, fontsize=9,
        )  # fmt: skip
        return finish(
            drawing,
            name=name,
            caption="VBench's dimensions, quality above and semantic below, with 95 % intervals where they are known.",
            alt=f"Scores in percent by dimension. {'; '.join(words)}.",
        )


def radar(rows: Sequence[Result], *, name: str) -> Figure | None:
    """The same scores as a radar, which papers print; rows with all sixteen dimensions only.

    Args:
        rows: as ``dimension_rows`` gives them.
        name: file name without ending.

    Returns:
        The figure, or None where no row has all dimensions.
    """
    full = [row for row in rows if all(row.metric(dimension) is not None for dimension in DIMENSIONS)]
    if not full:
        return None
    angles = [2 * math.pi * i / len(DIMENSIONS) for i in range(len(DIMENSIONS) + 1)]
    with canvas(6.4, 6.2) as drawing:
        axes = drawing.add_subplot(projection="polar")
        for row, look in zip(rows, _looks(rows), strict=True):  # looks as in the figure of dots
            if row not in full:
                continue
            values = [100 * metric.value for dimension in DIMENSIONS if (metric := row.metric(dimension))]
            line = "-" if look["markerfacecolor"] == look["color"] else "--"
            axes.plot(angles, [*values, values[0]], linewidth=1.4, markersize=4, linestyle=line, label=row.name, **look)
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        axes.set_xticks(angles[:-1], [LABELS[dimension] for dimension in DIMENSIONS], fontsize=9, color=INK)
        for label, angle in zip(axes.get_xticklabels(), angles, strict=False):  # away from the circle on either side
            side = round(math.sin(angle), 6)
            label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
        axes.set_ylim(0, 100)
        axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100"], fontsize=8)
        axes.set_rlabel_position(191)  # between two axes
        axes.tick_params(axis="x", pad=2)
        axes.grid(color=LINE, linewidth=0.8)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9)
        return finish(
            drawing,
            name=name,
            caption="The same as a radar. Its area means nothing and depends on the order of the axes: read the dots.",
            alt=f"Radar of the sixteen dimensions for {', '.join(row.name for row in full)}; numbers in the table.",
        )


def preferences(rows: Sequence[Preference], *, name: str) -> Figure | None:
    """Preference for a over b by question, with intervals and the line of no preference.

    Args:
        rows: results of one study.
        name: file name without ending.

    Returns:
        The figure, or None without rows.
    """
    if not rows:
        return None
    questions = sorted({row.question for row in rows}, reverse=True)
    colors = {
        question: STYLES[key][1] for question, key in zip(questions, ("tmd", "dmd2-v", "rcm", "kd"), strict=False)
    }
    simulated = any(row.simulated for row in rows)
    with canvas(6.4, 1.0 + 0.5 * len(rows)) as drawing:
        axes = drawing.add_subplot()
        for place, row in enumerate(rows):
            color = colors.get(row.question, MUTED)
            axes.barh(place, 100 * row.value, height=0.62, color=color, alpha=0.35, linewidth=0)
            if row.low is not None and row.high is not None:
                axes.plot([100 * row.low, 100 * row.high], [place, place], color=color, linewidth=2)
            axes.plot([100 * row.value], [place], marker="o", color=color, markersize=6)
        axes.axvline(50, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(
            range(len(rows)), [f"{_short(f'{row.a} over {row.b}')}\n{_short(row.question)}" for row in rows], fontsize=9
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("Share of votes, %" + (" (simulated raters)" if simulated else ""))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
        words = "; ".join(
            f"{row.a} over {row.b}, {row.question}: {100 * row.value:.1f} %"
            + ("" if row.low is None or row.high is None else f" [{100 * row.low:.1f}, {100 * row.high:.1f}]")
            for row in rows
        )
        return finish(
            drawing,
            name=name,
            caption=f"Study {rows[0].study}{', simulated raters' if simulated else ''}: share of votes for the first "
            "model, with 95 % intervals; the dashed line is no preference.",
            alt=f"Preferences{' of simulated raters' if simulated else ''}. {words}.",
        )


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:47]}\u2026"
