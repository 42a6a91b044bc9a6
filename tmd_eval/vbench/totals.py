"""Quality, semantic and total score of VBench from its sixteen dimensions, unclipped.

Constants of ``scripts/constant.py`` in Vchitect/VBench. A dimension that was not measured is an error here; the
official script counts it as 0, which is how totals of -57 % came onto the public leaderboard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from students.errors import ConfigError, IncompleteError
from tmd_eval.vbench.dimensions import DIMENSIONS, check_dimension

QUALITY: dict[str, float] = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
}
"""Weight of each quality dimension; the other nine are semantic and weigh 1."""
SEMANTIC = tuple(name for name in DIMENSIONS if name not in QUALITY)
QUALITY_SHARE = 4 / 5
RANGE: dict[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Lowest and highest raw score that normalisation maps to 0 and 1; (0, 1) for the others."""

Number = float | NDArray[np.float64]


class Totals(NamedTuple):
    """The three scores, on the scale 0 to 1 (unclipped), or arrays of them."""

    quality: Number
    """Weighted mean of seven normalised dimensions."""
    semantic: Number
    """Mean of nine normalised dimensions."""
    total: Number
    """(4 quality + semantic) / 5."""


def normalize(dimension: str, value: Number) -> Number:
    """(value - min) / (max - min), not clipped.

    Args:
        dimension: one of the sixteen.
        value: raw score, 0 to 1, or an array of them.
    """
    low, high = RANGE.get(dimension, (0.0, 1.0))
    return (value - low) / (high - low)


def totals(values: Mapping[str, Number]) -> Totals:
    """Quality, semantic and total score.

    Args:
        values: raw score of each of the sixteen dimensions, 0 to 1; arrays of equal shape give arrays.

    Raises:
        IncompleteError: a dimension is missing or not a number; names each.
    """
    missing = [name for name in DIMENSIONS if name not in values or np.isnan(values[name]).any()]
    if missing:
        raise IncompleteError(
            f"No total without {', '.join(missing)}: all sixteen dimensions are needed, and a missing one is not 0."
        )
    quality: Any = sum(weight * normalize(name, values[name]) for name, weight in QUALITY.items())
    quality = quality / sum(QUALITY.values())
    semantic: Any = sum(normalize(name, values[name]) for name in SEMANTIC)
    semantic = semantic / len(SEMANTIC)
    return Totals(quality, semantic, QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic)


def totals_of_file(path: Path) -> dict[str, float]:
    """Quality, semantic and total in percent from a file ``{dimension: percent}``.

    Args:
        path: JSON with underscored names; nothing else may be in it.

    Raises:
        ConfigError: no such file, not such JSON, an unknown dimension, or no number.
        IncompleteError: a dimension is missing; names it.
    """
    try:
        percents = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path} ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); write {{dimension: percent}}.") from error
    if not isinstance(percents, dict):
        raise ConfigError(f"{path} must map dimensions to percent, like {{'color': 85.1, ...}}.")
    values: dict[str, Number] = {}
    for name, percent in percents.items():
        check_dimension(name)
        if percent is None or (isinstance(percent, float) and math.isnan(percent)):
            continue  # not measured
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not math.isfinite(percent):
            raise ConfigError(f"{path} gives {percent!r} for {name}; write a number in percent.")
        values[name] = percent / 100
    result = totals(values)
    return {key: 100 * float(value) for key, value in result._asdict().items()}
