"""Statistics on scores: rank ranges, paired differences on common prompts, the Pareto front and how sure it is.

What is drawn anew is always prompts, never videos: the videos of one prompt are alike. Draws have a fixed seed, so the
same database gives the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS, SEED = 2000, 0
FEWEST = 5
"""Common prompts of a paired difference, at least: fewer can agree by chance."""
Z = 1.959964
"""97.5 % quantile of the normal distribution."""


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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """a minus b in one metric, over the prompts that both have."""

    value: float
    """Mean over prompts of the difference of the prompts' means."""
    low: float
    high: float
    prompts: int
    """Prompts that both have."""

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@lru_cache(maxsize=4)
def prompt_weights(prompts: int) -> NDArray[np.float32]:
    """Bootstrap weights, shape (``DRAWS``, prompts): how often each prompt is drawn, over the number of prompts."""
    counts = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)
    return (counts / prompts).astype(np.float32)


@lru_cache
def wider(prompts: int) -> float:
    """How much farther from the value than a bootstrap of so many prompts puts them an interval's ends lie.

    sqrt(P / (P - 1)) t / z with the 97.5 % quantiles of Student's t (P - 1 degrees of freedom) and of the normal
    distribution; 1 for a single prompt, which has no spread.
    """
    from scipy.stats import t

    return (prompts / (prompts - 1)) ** 0.5 * float(t.ppf(0.975, prompts - 1)) / Z if prompts > 1 else 1.0


def paired_differences(
    pairs: Mapping[tuple[int, int], tuple[Mapping[int, float], Mapping[int, float]]],
) -> dict[tuple[int, int], Difference]:
    """Differences with 95 % percentile intervals of a bootstrap over the common prompts.

    A bootstrap of few prompts is too narrow, so its ends are taken :func:`wider` from the mean.

    Args:
        pairs: for each pair of rows the means of its prompts, of a and of b, by prompt.

    Returns:
        For each pair with at least ``FEWEST`` common prompts its difference.
    """
    columns: dict[int, list[tuple[tuple[int, int], NDArray[np.float64]]]] = {}
    for pair, (a, b) in pairs.items():
        common = sorted(a.keys() & b.keys())
        if len(common) >= FEWEST:
            difference = np.array([a[prompt] - b[prompt] for prompt in common])
            columns.setdefault(len(common), []).append((pair, difference))
    found = {}
    for prompts, entries in columns.items():  # one product of matrices for all pairs with as many prompts
        drawn = prompt_weights(prompts) @ np.stack([d for _, d in entries], axis=1)
        means = np.array([difference.mean() for _, difference in entries])
        lows, highs = means + wider(prompts) * (np.quantile(drawn, [0.025, 0.975], axis=0) - means)
        for (pair, _), value, low, high in zip(entries, means, lows, highs, strict=True):
            found[pair] = Difference(value=float(value), low=float(low), high=float(high), prompts=prompts)
    return {pair: found[pair] for pair in pairs if pair in found}


def on_front(cost: ArrayLike, score: ArrayLike) -> NDArray[np.bool_]:
    """Which rows no other row beats: none costs no more and scores more, or costs less and scores no less.

    Args:
        cost: shape (R,), lower is better.
        score: shape (R,) or (draws, R), higher is better.

    Returns:
        Of the shape of ``score``.

    >>> on_front([1, 2, 4], [0.5, 0.7, 0.6]).tolist()
    [True, True, False]
    """
    cost, score = np.asarray(cost, np.float64), np.asarray(score, np.float64)
    order = np.lexsort((np.arange(len(cost)), cost))
    ordered, groups = score[..., order], np.unique(cost[order], return_index=True)[1]
    # best of each cost, then the best of all lower costs before it
    best = np.maximum.reduceat(ordered, groups, axis=-1)
    before = np.maximum.accumulate(best, axis=-1)
    before = np.concatenate([np.full((*before.shape[:-1], 1), -np.inf), before[..., :-1]], axis=-1)
    sizes = np.diff([*groups, len(cost)])
    front = (ordered >= np.repeat(best, sizes, axis=-1)) & (ordered > np.repeat(before, sizes, axis=-1))
    found = np.empty_like(front)
    found[..., order] = front
    return found


def score_draws(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Draws of each row's score, shape (``DRAWS``, R): normal, with the 95 % interval's width, rows independent.

    Prompts that rows have in common make their errors alike; taking them as independent errs towards less certainty.
    """
    value, low, high = (np.asarray(x, np.float64) for x in (value, low, high))
    noise = np.random.default_rng(SEED).standard_normal((DRAWS, len(value)))
    return value + noise * (high - low) / (2 * Z)


def front_probability(
    cost: ArrayLike, value: ArrayLike, low: ArrayLike, high: ArrayLike, *, higher_is_better: bool = True
) -> NDArray[np.float64]:
    """Share of boards, resampled as :func:`score_draws` does, on whose Pareto front each row is.

    Args:
        cost: shape (R,), lower is better.
        value: scores, shape (R,).
        low: lower ends of their 95 % intervals.
        high: upper ends.
        higher_is_better: direction of the score.

    Returns:
        Shape (R,), 0 to 1.
    """
    sign = 1 if higher_is_better else -1
    value, low, high, cost = (np.asarray(x, np.float64) for x in (value, low, high, cost))
    # rows that another beats by more than any draw could mend are left out: a board of thousands has few others
    reach = value + 3 * (high - low) * sign
    floor = np.array([np.max((sign * (value - 3 * sign * (high - low)))[cost <= c]) for c in cost])
    kept = sign * reach >= floor
    shares = np.zeros(len(value))
    shares[kept] = on_front(cost[kept], sign * score_draws(value[kept], low[kept], high[kept])).mean(axis=0)
    return shares
