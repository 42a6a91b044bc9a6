"""Statistics on scores that need only their intervals; numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_ranges(low: ArrayLike, high: ArrayLike, *, higher_is_better: bool = True) -> NDArray[np.int64]:
    """Best and worst rank that each result can claim, so that noise is not sorted.

    A result is below another only where their intervals lie wholly apart: the best rank is 1 + the number of results
    surely better, the worst the number of results minus those surely worse.

    Args:
        low: lower ends of the intervals, shape (R,).
        high: upper ends, shape (R,), none below its lower end.
        higher_is_better: direction of the score.

    Returns:
        Shape (R, 2): best and worst rank, from 1.

    >>> rank_ranges([0.9, 0.85, 0.1], [0.95, 0.92, 0.2]).tolist()
    [[1, 2], [1, 2], [3, 3]]
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not higher_is_better:
        low, high = -high, -low
    above = low[None, :] > high[:, None]  # above[i, j]: j is surely better than i
    return np.stack([1 + above.sum(axis=1), len(low) - above.sum(axis=0)], axis=1)


def intervals_apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals (low, high) share no point."""
    return a[1] < b[0] or b[1] < a[0]
