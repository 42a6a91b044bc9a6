"""Estimates of a win rate besides the logit: counts, permutation of prompts, two-way bootstrap, Holm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def wilson(wins: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share, votes taken as independent.

    Args:
        wins: successes, ties as one half.
        n: votes, above 0.
        level: of the interval, 0 to 1.
    """
    z = float(stats.norm.ppf((1 + level) / 2))
    share, spread = wins / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    width = z / (1 + spread) * float(np.sqrt(share * (1 - share) / n + spread / (4 * n)))
    return max(0.0, middle - width), min(1.0, middle + width)


def clopper_pearson(wins: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact, conservative interval for a share; see :func:`wilson`."""
    tail = (1 - level) / 2
    low = 0.0 if wins <= 0 else float(stats.beta.ppf(tail, wins, n - wins + 1))
    high = 1.0 if wins >= n else float(stats.beta.ppf(1 - tail, wins + 1, n - wins))
    return low, high


def prompt_means(y: Floats, prompts: Ints) -> tuple[Floats, Floats]:
    """Mean outcome of each prompt and its number of votes."""
    labels, inverse = np.unique(prompts, return_inverse=True)
    counts = np.bincount(inverse.reshape(-1), minlength=len(labels)).astype(np.float64)
    return np.bincount(inverse.reshape(-1), weights=y, minlength=len(labels)) / counts, counts


def sign_flip(y: Floats, prompts: Ints, *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of "no preference", flipping A and B for whole prompts.

    Distribution-free given that prompts are exchangeable under the null; raters' own leanings are not covered.

    Args:
        y: outcomes, shape (n,), 0 to 1.
        prompts: prompt of each vote.
        draws: random flips; up to 13 prompts all flips are counted instead.
        seed: of the flips; the same for a mirrored study, so that p mirrors exactly.
    """
    means, counts = prompt_means(y, prompts)
    lean = (means - 0.5) * counts
    observed = abs(lean.sum())
    if len(lean) <= 13:
        signs = 1 - 2 * ((np.arange(2 ** len(lean))[:, None] >> np.arange(len(lean))) & 1)
        return float(np.mean(np.abs(signs @ lean) >= observed - 1e-9))
    signs = np.random.default_rng(seed).integers(0, 2, (draws, len(lean)), dtype=np.int8) * 2 - 1
    return float((1 + np.sum(np.abs(signs @ lean) >= observed - 1e-9)) / (draws + 1))


def two_way_bootstrap(
    y: Floats, prompts: Ints, raters: Ints, *, draws: int = 4000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval for the win rate, resampling prompts and raters at once (pigeonhole bootstrap, Owen 2007).

    Args:
        y: outcomes, shape (n,), 0 to 1.
        prompts: prompt of each vote.
        raters: rater of each vote.
        draws: resamples.
        seed: of the resampling.
        level: of the interval.
    """
    p_labels, p = np.unique(prompts, return_inverse=True)
    r_labels, r = np.unique(raters, return_inverse=True)
    shape = (len(p_labels), len(r_labels))
    counts, sums = np.zeros(shape), np.zeros(shape)
    np.add.at(counts, (p.reshape(-1), r.reshape(-1)), 1.0)
    np.add.at(sums, (p.reshape(-1), r.reshape(-1)), y - 0.5)
    rng = np.random.default_rng(seed)
    prompt_weights = rng.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), draws).astype(np.float64)
    rater_weights = rng.multinomial(shape[1], np.full(shape[1], 1 / shape[1]), draws).astype(np.float64)
    total = np.einsum("bp,pr,br->b", prompt_weights, counts, rater_weights, optimize=True)
    lean = np.einsum("bp,pr,br->b", prompt_weights, sums, rater_weights, optimize=True)
    rates = 0.5 + lean[total > 0] / total[total > 0]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order.

    >>> holm([0.01, 0.04])
    [0.02, 0.04]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
