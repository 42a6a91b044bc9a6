"""What a score may be: names of dimensions, ranges, and the arithmetic that a row of totals must satisfy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

QUALITY_DIMENSIONS = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
"""VBench's dimensions in the quality score, in the package's order."""
SEMANTIC_DIMENSIONS = (
    *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"),
    *("appearance_style", "temporal_style", "overall_consistency"),
)
"""VBench's dimensions in the semantic score."""
DIMENSIONS = QUALITY_DIMENSIONS + SEMANTIC_DIMENSIONS
TOTALS = ("total", "quality", "semantic")
"""Scores made from all sixteen dimensions."""
SIGNED = frozenset({*TOTALS, "appearance_style", "temporal_style", "overall_consistency"})
"""Scores that may be negative: cosines, and sums of normalised values, which VBench does not clip."""


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The option most like a name, or None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(options), 1, cutoff)), None)


def total_of(quality: float, semantic: float) -> float:
    """VBench's total: (4 quality + semantic) / 5, on any one scale.

    >>> round(total_of(85.71, 80.55), 3)
    84.678
    """
    return (4 * quality + semantic) / 5


def nfe_of(m: int, n: int | None = None, h: int | None = None, blocks: int | None = None) -> float | None:
    """Effective NFE: M for a plain model, M (1 + (N - 1) H / L) for TMD (Eq. 16); None where L is needed and unknown.

    >>> round(nfe_of(2, 2, 5, 30), 4)
    2.3333
    """
    if n is None or h is None:
        return float(m)
    return None if blocks is None else m * (1 + (n - 1) * h / blocks)


def finite(value: Any) -> float:
    """The value as a number.

    Raises:
        ValueError: it is NaN, infinite or no number.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a finite number")
    return number


def both_ends(name: str, low: float | None, high: float | None) -> None:
    """Refuse an interval with one end.

    Raises:
        ValueError: only one of the two is there.
    """
    if (low is None) != (high is None):
        raise ValueError(f"{name} has the interval [{low}, {high}]; give both ends, or neither")


def without_lone_totals(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries; totals only where all sixteen dimensions they are made of are complete."""
    full = {metric["name"] for metric in metrics if metric["completeness"] == 1}
    return metrics if full.issuperset(DIMENSIONS) else [m for m in metrics if m["name"] not in TOTALS]


def check_metric(name: str, entry: Any) -> dict[str, Any]:
    """One entry of a summary of scores as the columns of ``models.Metric``.

    Args:
        name: metric; one that is nearly, but not quite, a VBench dimension is taken for a slip of the pen.
        entry: mapping with value, low, high, n, completeness, metric_version and weight_hashes.

    Raises:
        ValueError: an unknown dimension, or a number out of its range.
        KeyError: a field is missing.
    """
    if name not in DIMENSIONS and (near := nearest(name, DIMENSIONS, 0.85)):
        raise ValueError(f"there is no dimension {name!r}; did you mean {near!r}?")
    value = finite(entry["value"])
    low, high = (None if entry.get(key) is None else finite(entry[key]) for key in ("low", "high"))
    n, completeness = int(entry["n"]), finite(entry["completeness"])
    if value < 0 and name not in SIGNED:
        raise ValueError(f"{name} is {value}, but it cannot be negative")
    if value > 1 and (name in DIMENSIONS or name.startswith("alignment")):
        raise ValueError(f"{name} is {value}, but scores are between 0 and 1")
    both_ends(name, low, high)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{name} has the interval [{low}, {high}], whose ends are swapped")
    if n < 0 or not 0 <= completeness <= 1:
        raise ValueError(f"{name} has n = {n} and completeness {completeness}; they must be at least 0, and 0 to 1")
    return {
        "name": name,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "completeness": completeness,
        "metric_version": str(entry["metric_version"]),
        "weight_hashes": {str(key): str(digest) for key, digest in entry["weight_hashes"].items()},
    }
