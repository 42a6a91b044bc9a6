"""Direct labels of a figure: each name at the place around its point where it covers least."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from leaderboard.figures import Point

_NEAR = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (7, 8, "left", "bottom"),
    (-7, 8, "right", "bottom"),
    (7, -8, "left", "top"),
    (-7, -8, "right", "top"),
)
_FAR = tuple(
    (
        dx,
        dy,
        "left" if dx > 0 else "right" if dx < 0 else "center",
        "bottom" if dy > 0 else "top" if dy < 0 else "center",
    )
    for reach in (22, 36, 52)
    for dx, dy in (
        (reach, reach),
        (-reach, reach),
        (reach, -reach),
        (-reach, -reach),
        (0, reach),
        (0, -reach),
        (reach, 0),
    )
)
"""Offsets in points and alignment, best first; far places get a thin line to their point."""
LONGEST = 32
"""Characters of a label; longer names end in an ellipsis."""


def place_labels(
    drawing: Any, axes: Any, named: Sequence[Point], drawn: Sequence[Point], joined: Sequence[Sequence[Point]]
) -> None:
    """Put the names of points beside them.

    Args:
        drawing: the matplotlib figure.
        axes: its axes, whose limits are final.
        named: points that get a label, most important first: it has the choice.
        drawn: all points, which labels should not cover.
        joined: lines that labels should not cover.
    """
    renderer = drawing.canvas.get_renderer()
    drawing.draw_without_rendering()
    pixels = drawing.dpi / 72
    frame = axes.get_window_extent(renderer).extents
    taken: list[tuple[float, float, float, float]] = []
    for point in drawn:
        x, y = axes.transData.transform((point.x, point.y))
        low, high = (axes.transData.transform((point.x, end))[1] for end in (point.low, point.high))
        taken.append((x - 6 * pixels, y - 6 * pixels, x + 6 * pixels, y + 6 * pixels))
        taken.append((x - pixels, low, x + pixels, high))
        if point.role == "teacher":
            taken.append((frame[0], y - 2 * pixels, frame[2], y + 2 * pixels))
    for line in joined:
        for begin, end in pairwise(axes.transData.transform([(p.x, p.y) for p in line])):
            steps = [begin + (end - begin) * i / 60 for i in range(61)]
            taken += [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in steps]
    for point in named:
        text = point.short or point.label
        text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"
        size = axes.annotate(text, (point.x, point.y), fontsize=10)
        extent = size.get_window_extent(renderer)
        width, height = extent.width, extent.height
        size.remove()
        anchor = axes.transData.transform((point.x, point.y))
        occupied = np.array(taken)
        best: tuple[float, int, tuple[Any, ...], tuple[float, float, float, float]] | None = None
        for rank, place in enumerate((*_NEAR, *_FAR)):
            box = _box(anchor, place, width, height, pixels)
            outside = width * height - float(_overlaps(box, np.array([frame]))[0])
            cost = float(_overlaps(box, occupied).sum()) + 20 * outside + (rank >= len(_NEAR)) * 0.12 * width * height
            if best is None or cost < best[0] - 1e-6:
                best = (cost, rank, place, box)
        assert best is not None
        _, rank, (dx, dy, horizontal, vertical), box = best
        arrow = {"arrowstyle": "-", "linewidth": 0.6, "color": "#5b6570", "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            text, (point.x, point.y), xytext=(dx, dy), textcoords="offset points", ha=horizontal, va=vertical,
            fontsize=10, zorder=5, arrowprops=arrow if rank >= len(_NEAR) else None,
        )  # fmt: skip
        corners = axes.transAxes.inverted().transform([box[:2], box[2:]])
        ground = {"color": "#ffffff", "alpha": 0.7, "linewidth": 0, "zorder": 4}  # no line strikes a name
        axes.fill_between(corners[:, 0], *corners[:, 1], transform=axes.transAxes, **ground)
        gap = 2 * pixels
        taken += 2 * [(box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)]  # a name under a name is worst


def _box(
    anchor: Any, place: tuple[int, int, str, str], width: float, height: float, pixels: float
) -> tuple[float, float, float, float]:
    """Left, bottom, right and top in pixels of a label at a place."""
    dx, dy, horizontal, vertical = place
    x, y = anchor[0] + dx * pixels, anchor[1] + dy * pixels
    left = x - {"left": 0.0, "center": width / 2, "right": width}[horizontal]
    bottom = y - {"bottom": 0.0, "center": height / 2, "top": height}[vertical]
    return left, bottom, left + width, bottom + height


def _overlaps(box: tuple[float, float, float, float], others: Any) -> Any:
    """Common areas of a box with each of others, shape (n, 4)."""
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return np.clip(width, 0, None) * np.clip(height, 0, None)
