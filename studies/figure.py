"""The figure of a study, like the paper's Figure 5: a bar a pair and question, its interval, and the 50 % line."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

INK, MUTED, A_COLOR, B_COLOR = "#1b1f24", "#5b6570", "#0072b2", "#d9dee3"
SETTINGS = {
    "svg.hashsalt": "tmd-eval",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names, whatever dollar signs they hold
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
}
LONGEST = 34
"""Characters of a model's name in the figure."""


def draw(preferences: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the results; the same results give the same bytes.

    Args:
        preferences: content of preferences.json.

    Returns:
        File ending ("svg", "png") to content.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = preferences["results"]
    with rc_context(SETTINGS):
        figure = Figure(figsize=(7.6, 1.25 + 0.62 * len(results)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, row in enumerate(results):
            share = 100 * row["value"]
            axes.barh(place, share, color=A_COLOR, height=0.56)
            axes.barh(place, 100 - share, left=share, color=B_COLOR, height=0.56)
            ends = [[share - 100 * row["low"]], [100 * row["high"] - share]]
            axes.errorbar(share, place, xerr=ends, color=INK, capsize=4, linewidth=1.6)
            axes.text(1.2, place, f"{share:.1f} %", va="center", ha="left", color="white", fontweight="bold")
            axes.text(98.8, place, f"{100 - share:.1f} %", va="center", ha="right", color=INK)
            names = f"{_short(row['a'])} (blue) against {_short(row['b'])}"
            axes.text(0, place - 0.34, names, va="bottom", ha="left", fontsize=8.5, color=MUTED)
        axes.axvline(50, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(results)), [row["question"] for row in results])
        axes.set_ylim(len(results) - 0.6, -0.75)
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        people = "SIMULATED raters" if preferences["simulated"] else "raters"
        axes.set_xlabel(
            f"preferred; 95 % intervals; {preferences['votes']} votes of {preferences['raters']} {people}", color=INK
        )
        if preferences["simulated"]:
            figure.suptitle("Simulated raters, not people", fontsize=10.5, color="#b00020", fontweight="bold")
        found = {}
        for ending, extra in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150, "metadata": {}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, facecolor="white", **extra)
            found[ending] = buffer.getvalue()
    return found


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
