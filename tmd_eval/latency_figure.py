"""The stacked bars of ``tmd-eval latency``: which part of the time dominates at which effective NFE."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

from tmd_eval.latency import PARTS, dominant

matplotlib.use("Agg")

from matplotlib.figure import Figure

COLOURS = {"text": "#009e73", "backbone": "#0072b2", "head": "#56b4e9", "vae": "#e69f00", "write": "#999999"}
"""Okabe and Ito's, safe for colour-blind readers."""
LABELS = {"text": "text encoder", "backbone": "DiT backbone", "head": "flow head", "vae": "VAE", "write": "file"}
HATCHES = {"text": "", "backbone": "", "head": "//", "vae": "", "write": ".."}


def latency_figure(rows: Sequence[dict[str, Any]], device: str, kind: str) -> bytes:
    """One bar a row, in the rows' order: shares of the time by part; seconds a video stand beside it.

    Shares, since a teacher takes tens of times as long as a student and would leave nothing to see of the others.

    Args:
        rows: of ``latency.json``.
        device: named in the title.
        kind: "svg" or "png".
    """
    figure = Figure(figsize=(8.6, 1.3 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        total = row["seconds"]["total"]["median"]
        left = 0.0
        for part in PARTS:
            times = row["seconds"][part]
            if times is None:
                continue
            share = 100 * times["median"] / total
            axes.barh(
                place, share, left=left, color=COLOURS[part], hatch=HATCHES[part], edgecolor="white", linewidth=0.6,
                label=LABELS[part] if part not in {p for r in rows[:place] for p in PARTS if r["seconds"][p]} else None,
            )  # fmt: skip
            if share >= 7:
                dark = part in ("backbone", "text")
                plain = {"facecolor": COLOURS[part], "edgecolor": "none", "pad": 1.5}  # hatching hides digits
                axes.text(
                    left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8.5, bbox=plain,
                    color="white" if dark else "#1b1f24",
                )  # fmt: skip
            left += share
        seconds = total / row["batch"]
        axes.text(101, place, f"{seconds:.3g} s/video, most: {LABELS[dominant(row)]}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time of a video (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(device, fontsize=9, loc="left", parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    order = [LABELS[part] for part in PARTS if LABELS[part] in named]  # of the bars, whichever model has a part first
    figure.legend(
        [named[label] for label in order], order, loc="outside lower center", ncols=len(order), frameon=False,
        fontsize=8.5,
    )  # fmt: skip
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tmd-eval", "svg.fonttype": "none"}):
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _name(row: dict[str, Any]) -> str:
    name = row["name"] if len(row["name"]) <= 34 else row["name"][:33] + "..."
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    guided = "x2" if row["guidance"] > 1 else ""
    return f"{name}\nNFE {row['effective_nfe']:.3g}{guided}{batch}"
