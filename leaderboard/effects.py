"""Differences between rows of a matrix, with intervals over training seeds and prompts, and verdicts on claims.

A row is a few trainings that differ in the seed, each scored on the same prompts. Its metric has two kinds of noise:
that of training (few seeds) and that of the prompts. The mean over S seeds and P prompts has the variance

    V = s_seed^2 / S + s_prompt^2 / P - s_rest^2 / (S P),

with s_seed^2 the variance of the seeds' values, s_prompt^2 that of the prompts' means, and s_rest^2 the variance left
in the S x P table after both (it is part of the first two terms, so it is taken off once; V is never taken below either
of them). In a difference of two rows the prompts are paired, the seeds are not. Seeds and prompts each get their own
quantile of Student's t (with Satterthwaite's degrees of freedom for the seeds of two rows), and the half widths add in
squares. Where two rows sample the same students (at another N or M), each seed that both have gives a difference, and
these are treated like the values of one row. With 2 or 3 seeds the percentiles of a bootstrap over seeds and prompts
cover the truth in 80 to 90 % of cases instead of 95 % (tests/test_effects.py simulates both).

Rows of one family (a method at one M and budget: an ablation and its row, other N and H) start from the same seeds,
data order and largely the same draws. They are a block design, the seeds its blocks:

    value = row + seed + noise,

whose noise, estimated from all rows of the family by least squares (:func:`blocked`), is what is left of the training
in a difference of two of its rows, which is taken over the seeds that both have. How far seeds carry over is estimated,
not assumed: where they do not, the interval is wider than an unpaired one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NORMAL = 1.959964  # 97.5 % quantile of the normal distribution
MIN_DEGREES = 3  # of a family's noise: with 2, Student's t usually takes more than pairing gains
ROUNDING = 1e-12  # spread over the largest value, below which it is that of sums in floating point
Floats = NDArray[np.float64]
Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One metric of one row."""

    values: Floats
    """(S,) the metric of each seed."""
    ranges: Floats
    """(S, 2) its 95 % interval over prompts, from the scorer."""
    prompts: Floats | None
    """(S, P) means over the videos of each prompt, the same prompts in the same order in every row; None for metrics of
    a whole set (distances, diversity)."""
    trained: bool = True
    """False for the base model, which has no training noise."""
    students: tuple[str, ...] = ()
    """What tells the trained student of each seed; rows with the same ones share their training noise."""
    family: str = ""
    """Rows of one family start from the same random numbers at the same seed; "" for none."""
    numbers: tuple[int, ...] = ()
    """The seeds, where there is a family."""

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    degrees: float
    """Degrees of freedom of the training noise; infinite where there is none in the interval."""
    over_seeds: bool
    """Whether the interval covers the noise of training (it cannot with a single seed)."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Noise of training, taken from many rows together."""

    variance: float
    """Mean variance between the seeds of one row, or of a difference of two rows."""
    degrees: int
    """Its degrees of freedom."""


def pooled(rows: Iterable[Scores]) -> Pool | None:
    """The spread between seeds over all trained rows with two seeds or more; None where there is none.

    Rows that sample the same students count together as one, with the mean of their variances.

    Args:
        rows: one metric of the rows.
    """
    groups: dict[object, list[Scores]] = {}
    for number, row in enumerate(rows):
        if row.trained and row.seeds > 1:
            groups.setdefault(row.students or number, []).append(row)
    degrees = sum(group[0].seeds - 1 for group in groups.values())
    if not degrees:
        return None
    spread = sum((g[0].seeds - 1) * float(np.mean([row.values.var(ddof=1) for row in g])) for g in groups.values())
    return Pool(variance=spread / degrees, degrees=degrees)


def blocked(rows: Iterable[Scores]) -> Pool | None:
    """The noise of a difference of two rows of a family at one seed: twice that of value = row + seed + noise.

    Args:
        rows: one metric of the rows of one family; those that sample students of an earlier one are left out.

    Returns:
        Variance and degrees of freedom; None below ``MIN_DEGREES``.
    """
    kept: list[Scores] = []
    seen: set[str] = set()
    for row in rows:
        if row.trained and row.seeds > 1 and seen.isdisjoint(row.students):
            kept.append(row)
            seen |= set(row.students)
    if not kept:
        return None
    place = [(i, number) for i, row in enumerate(kept) for number in row.numbers]
    numbers = sorted({number for _, number in place})
    design = np.zeros((len(place), len(kept) + len(numbers)))
    for line, (i, number) in enumerate(place):
        design[line, [i, len(kept) + numbers.index(number)]] = 1
    values = np.concatenate([row.values for row in kept])
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(values) - int(rank)
    if degrees < MIN_DEGREES:
        return None
    noise = values - design @ fitted
    noise[np.abs(noise) <= ROUNDING * np.abs(values).max()] = 0.0
    return Pool(variance=2 * float((noise**2).sum()) / degrees, degrees=degrees)


def estimate(row: Scores, *, pool: Pool | None = None, bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean of a row's metric over its seeds.

    Args:
        row: the scores.
        pool: spread between seeds to use where it is larger than the row's own.
        bounds: ends of the scale, at which the interval is cut.
    """
    value = float(row.values.mean())
    alone = row.seeds == 1 and (pool is None or not row.trained)
    seeds, over_seeds = _seeds(row, pool)
    prompts = _prompts(row)
    if alone or prompts[0] + sum(v for v, _ in seeds) == 0:
        # one seed: the scorer's interval; no spread at all: its exact bound for 0 % or 100 %
        low, high = float(row.ranges[:, 0].min()), float(row.ranges[:, 1].max())
        return Estimate(value=value, low=low, high=high, degrees=np.inf, over_seeds=over_seeds)
    return _interval(value, seeds, [prompts], _rest(row), over_seeds, bounds)


def difference(a: Scores, b: Scores, *, pool: Pool | None = None, block: Pool | None = None) -> Estimate:
    """The metric of a minus that of b.

    Args:
        a: one row.
        b: another one, on the same prompts.
        pool: spread between seeds to use where it is larger than a row's own.
        block: where both are of one family, the noise of a difference at one seed (:func:`blocked`), to use where it is
            larger than their own.
    """
    common = [student for student in a.students if student in b.students]
    if common and len(common) == min(len(a.students), len(b.students)):
        return estimate(_seed_by_seed(a, b, a.students, b.students))
    if block is not None and len(set(a.numbers) & set(b.numbers)) > 1:
        return estimate(_seed_by_seed(a, b, a.numbers, b.numbers), pool=block)
    value = float(a.values.mean() - b.values.mean())
    (seeds_a, over_a), (seeds_b, over_b) = _seeds(a, pool), _seeds(b, pool)
    rest = 0.0
    if _paired(a, b):
        assert a.prompts is not None and b.prompts is not None
        paired = a.prompts.mean(axis=0) - b.prompts.mean(axis=0)
        prompts = [(_variance(paired) / len(paired), len(paired) - 1.0)]
        rest = _rest(a) + _rest(b)
    else:
        prompts = [_prompts(a), _prompts(b)]
    seeds, over_seeds = [*seeds_a, *seeds_b], over_a and over_b
    if sum(variance for variance, _ in (*seeds, *prompts)) == 0:
        low = float(a.ranges[:, 0].min() - b.ranges[:, 1].max())
        high = float(a.ranges[:, 1].max() - b.ranges[:, 0].min())
        return Estimate(value=value, low=low, high=high, degrees=np.inf, over_seeds=over_seeds)
    return _interval(value, seeds, prompts, rest, over_seeds, None)


def _seed_by_seed(a: Scores, b: Scores, of_a: Sequence[object], of_b: Sequence[object]) -> Scores:
    """The differences of two rows at what both have, such as students or seeds."""
    common = [one for one in of_a if one in of_b]
    a, b = _only(a, [of_a.index(one) for one in common]), _only(b, [of_b.index(one) for one in common])
    values = a.values - b.values
    table = a.prompts - b.prompts if _paired(a, b) else None  # type: ignore[operator]
    (down_a, up_a), (down_b, up_b) = ((row.values - row.ranges[:, 0], row.ranges[:, 1] - row.values) for row in (a, b))
    ranges = np.stack([values - np.hypot(down_a, up_b), values + np.hypot(up_a, down_b)], axis=1)
    return Scores(values=values, ranges=ranges, prompts=table, trained=a.trained)


def _only(row: Scores, kept: Sequence[int]) -> Scores:
    prompts = None if row.prompts is None else row.prompts[kept]
    return replace(row, values=row.values[kept], ranges=row.ranges[kept], prompts=prompts)


def _paired(a: Scores, b: Scores) -> bool:
    return a.prompts is not None and b.prompts is not None and a.prompts.shape[1] == b.prompts.shape[1]


def verdict(
    effect: Estimate, direction: Literal["higher", "lower", "same"], margin: float | None = None
) -> tuple[Verdict, str]:
    """What an effect (a minus b) says of a claim about a.

    Args:
        effect: the difference.
        direction: what is claimed of a.
        margin: for "same", the largest difference that counts as the same.

    Returns:
        The verdict and, where it is undecided, why.
    """
    if not effect.over_seeds:
        return "undecided", "a single seed: the noise of training is unknown"
    if direction == "same":
        assert margin is not None
        if -margin <= effect.low and effect.high <= margin:
            return "holds", ""
        if effect.low > margin or effect.high < -margin:
            return "does not hold", ""
        return "undecided", "the interval reaches both below and above the margin"
    low, high = (effect.low, effect.high) if direction == "higher" else (-effect.high, -effect.low)
    if low > 0:
        return "holds", ""
    if high < 0:
        return "does not hold", ""
    return "undecided", "the interval holds 0"


def _seeds(row: Scores, pool: Pool | None) -> tuple[list[tuple[float, float]], bool]:
    """Term of the training noise, (variance of the mean, degrees), and whether it is known."""
    if not row.trained:
        return [], True
    own = _variance(row.values) if row.seeds > 1 else 0.0
    if pool is not None:
        return [(max(own, pool.variance) / row.seeds, float(pool.degrees))], True
    if row.seeds == 1:
        return [], False
    return [(own / row.seeds, row.seeds - 1.0)], True


def _prompts(row: Scores) -> tuple[float, float]:
    """Term of the prompts; for metrics of a whole set from the scorer's intervals, the same prompts in every seed."""
    if row.prompts is not None:
        means = row.prompts.mean(axis=0)
        return _variance(means) / len(means), len(means) - 1.0
    widths = (row.ranges[:, 1] - row.ranges[:, 0]) / (2 * NORMAL)
    return float((widths**2).mean()), np.inf


def _rest(row: Scores) -> float:
    """What the terms of seeds and prompts count twice: s_rest^2 / (S P)."""
    table = row.prompts
    if table is None or not row.trained or min(table.shape) < 2:
        return 0.0
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    seeds, prompts = table.shape
    return float((residual**2).sum() / ((seeds - 1) * (prompts - 1)) / (seeds * prompts))


def _variance(values: Floats) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _interval(
    value: float,
    seeds: Sequence[tuple[float, float]],
    prompts: Sequence[tuple[float, float]],
    rest: float,
    over_seeds: bool,
    bounds: tuple[float, float] | None,
) -> Estimate:
    """Half widths of seeds and prompts, each with its own t quantile, added in squares."""
    from scipy.stats import t

    squares, degrees = [], []
    for terms in (seeds, prompts):
        total = sum(variance for variance, _ in terms)
        parts = sum(variance**2 / freedom for variance, freedom in terms if np.isfinite(freedom) and freedom > 0)
        freedom = total**2 / parts if parts else np.inf
        quantile = float(t.ppf(0.975, freedom)) if np.isfinite(freedom) else NORMAL
        squares.append(quantile**2 * total)
        degrees.append(freedom)
    half = max(sum(squares) - NORMAL**2 * rest, *squares) ** 0.5
    low, high = value - half, value + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(value=value, low=low, high=high, degrees=float(degrees[0]), over_seeds=over_seeds)
