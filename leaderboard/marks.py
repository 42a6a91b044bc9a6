"""Marks of figures: every method has a marker and a colour, of Okabe and Ito's that colour-blind readers can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leaderboard.display import method_key

if TYPE_CHECKING:
    from leaderboard.figures import Point

INK, MUTED, LINE = "#1b1f24", "#5b6570", "#dde2e7"
STYLES = {
    "tmd": ("o", "#0072b2"),
    "tm-mf": ("o", "#56b4e9"),
    "dmd2-v": ("^", "#d55e00"),
    "rcm": ("D", "#009e73"),
    "kd": ("v", "#cc79a7"),
}
OTHERS = (("P", "#e69f00"), ("X", "#e69f00"), ("*", "#e69f00"))


def family(method: str) -> str:
    """The method whose marker a method has: "tmd" for "TMD-N2H5"; its own name where it has none."""
    key = method_key(method)
    found = [known for known in STYLES if key == known or key.startswith((f"{known}-", f"{known}+"))]
    return max(found, key=len, default=key)


def style(role: str, method: str, unknown: Sequence[str]) -> dict[str, Any]:
    """Marker and colour; methods without a marker of their own take one by their place among the unknown."""
    if role == "teacher":
        return {"marker": "s", "color": INK, "markerfacecolor": INK}
    if role == "undistilled":
        return {"marker": "s", "color": MUTED, "markerfacecolor": "#ffffff"}
    key = family(method)
    marker, color = STYLES.get(key) or OTHERS[unknown.index(key) % len(OTHERS)]
    return {"marker": marker, "color": color, "markerfacecolor": color}


def draw_mark(axes: Any, point: Point, unknown: Sequence[str]) -> None:
    """Draw a point's mark, and the character within it.

    Args:
        axes: matplotlib's.
        point: the point.
        unknown: methods without a marker of their own, see style.
    """
    look = style(point.role, point.method, unknown)
    if point.hollow:
        look["markerfacecolor"] = "#ffffff"
    size = 9.5 if point.digit and look["marker"] in "^v" else 7.5  # a digit fills more of a triangle
    axes.plot([point.x], [point.y], linestyle="", markersize=size, markeredgewidth=1.6, zorder=4, **look)
    if point.digit:
        ink = "#ffffff" if look["markerfacecolor"] == look["color"] else look["color"]
        drop = -1.1 if look["marker"] == "^" else -0.3  # a triangle's middle lies low
        axes.annotate(
            point.digit, (point.x, point.y), xytext=(0, drop), textcoords="offset points", ha="center",
            va="center_baseline", fontsize=6.5, color=ink, fontweight="bold", zorder=5,
        )  # fmt: skip
