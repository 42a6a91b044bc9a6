"""Aggregates of VBench's dimensions from values per video, with intervals over prompts and paired comparisons.

Every official aggregate of a single process is a ratio of sums, ``sum(weight * value) / sum(weight)``: the weight is
the number of frame pairs for subject and background consistency, of frames for the detectors, captions and appearance
style, and 1 elsewhere. What is resampled are prompts, since videos of one prompt are alike. Dimensions scored on the
same prompts (subject consistency, motion smoothness and dynamic degree, for example) share each resample, so that their
correlation enters the intervals of the totals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leaderboard.stats import FEWEST, wider
from tmd_eval.vbench.totals import Totals, totals

RESAMPLES, SEED = 2000, 0
PERMUTATIONS = 10_000
Interval = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """One dimension of one run, summed over the videos of each prompt."""

    prompts: tuple[str, ...]
    """The prompts, sorted."""
    value: NDArray[np.float64]
    """Sum of weight times value, shape (P,)."""
    weight: NDArray[np.float64]
    """Sum of weights, shape (P,); 0 where no video of the prompt counts."""
    n: int
    """Videos."""

    @property
    def aggregate(self) -> float:
        """The official aggregate, 0 to 1."""
        return float(self.value.sum() / self.weight.sum())


def sums(prompts: Sequence[str], values: Sequence[float], weights: Sequence[float]) -> Sums:
    """Sum per prompt.

    Args:
        prompts: of each video, shape (n,).
        values: on the aggregate's scale, shape (n,).
        weights: at least 0, shape (n,).
    """
    names, group = np.unique(np.array(prompts), return_inverse=True)
    weight, value = np.array(weights, np.float64), np.array(values, np.float64)
    return Sums(
        prompts=tuple(map(str, names)),
        value=np.bincount(group, weights=weight * value).astype(np.float64),
        weight=np.bincount(group, weights=weight).astype(np.float64),
        n=len(value),
    )


def _draws(prompts: tuple[str, ...], seed: int) -> NDArray[np.int64]:
    """How often each prompt is drawn, (RESAMPLES, P): the same for the same number of prompts and seed."""
    count = len(prompts)
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def resample(dimensions: Mapping[str, Sums], seed: int = SEED) -> dict[str, NDArray[np.float64]]:
    """Bootstrap aggregates of several dimensions, those on the same prompts with the same draws.

    Args:
        dimensions: sums of each.
        seed: of the resampling.

    Returns:
        (RESAMPLES,) aggregates of each; NaN where a draw holds no video that counts.
    """
    suites = {suite: place for place, suite in enumerate(dict.fromkeys(s.prompts for s in dimensions.values()))}
    # one stream for each suite; a dimension alone gets the stream of the first
    drawn = {suite: _draws(suite, seed + place) for suite, place in suites.items()}
    result = {}
    for name, one in dimensions.items():
        draws = drawn[one.prompts]
        with np.errstate(invalid="ignore"):
            result[name] = (draws @ one.value) / (draws @ one.weight)
    return result


def _prompts(one: Sums) -> int:
    """Prompts that count."""
    return int((one.weight > 0).sum())


def interval(one: Sums, seed: int = SEED, *, most: float = 1.0) -> tuple[float, float | None, float | None]:
    """The aggregate and its 95 % bootstrap interval over prompts; none with a single prompt.

    Where all values are 0, or all 1, resampling shows no spread although the truth may lie off it; the far end is then
    the exact (Clopper-Pearson) bound for no success, or no failure, in P prompts.
    """
    value, count = one.aggregate, _prompts(one)
    if count < 2:
        return value, None, None
    if value in (0.0, 1.0):
        edge = float(0.025 ** (1 / count))
        return (1.0, edge, 1.0) if value else (0.0, 0.0, 1 - edge)
    ends = np.nanquantile(resample({"it": one}, seed)["it"], [0.025, 0.975])
    low, high = np.clip(value + wider(count) * (ends - value), min(0.0, ends[0]), most)  # cosines may be negative
    return value, float(low), float(high)


def totals_intervals(dimensions: Mapping[str, Sums], seed: int = SEED) -> dict[str, Interval]:
    """Quality, semantic and total with 95 % bootstrap intervals over prompts, 0 to 1.

    Raises:
        IncompleteError: not all sixteen dimensions are there.
    """
    value = totals({name: one.aggregate for name, one in dimensions.items()})
    # color has draws without a detection when few prompts have one; elsewhere none are NaN
    drawn = {}
    for name, r in resample(dimensions, seed).items():
        one = dimensions[name]
        gap = np.where(np.isnan(r), 0.0, r - one.aggregate)
        drawn[name] = one.aggregate + wider(_prompts(one)) * gap  # totals are linear, so each takes its own width
    spread = totals({name: values for name, values in drawn.items()})
    result = {}
    for key in Totals._fields:
        low, high = np.quantile(getattr(spread, key), [0.025, 0.975])
        result[key] = (float(getattr(value, key)), float(low), float(high))
    return result


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B minus A on the same prompts."""

    value: float
    """Difference of the aggregates."""
    low: float | None
    """Lower end of the 95 % paired bootstrap interval, widened as :func:`wider` says; None below ``FEWEST`` prompts."""
    high: float | None
    """Upper end."""
    p_value: float
    """Two-sided, by swapping A and B within prompts."""
    n_prompts: int
    """Prompts both runs have."""


def differences(a: Mapping[str, Sums], b: Mapping[str, Sums], seed: int = SEED) -> dict[str, Difference]:
    """Paired differences, b minus a, of every dimension both runs have; with all sixteen, of the totals too.

    The interval resamples prompts, the p-value permutes: under the null hypothesis A and B may be swapped within each
    prompt, so the p-value is exact up to the 10,000 random swaps.

    Args:
        a: sums of the first run; prompts that the other lacks do not count.
        b: sums of the second.
        seed: of both resamplings.
    """
    common = {name: sorted(set(a[name].prompts) & set(b[name].prompts)) for name in a if name in b}
    both = {name: (_only(a[name], p), _only(b[name], p)) for name, p in common.items() if p}
    drawn_a = resample({name: pair[0] for name, pair in both.items()}, seed)
    drawn_b = resample({name: pair[1] for name, pair in both.items()}, seed)
    swapped = _swapped(both, seed)
    result = {}
    for name, (one, other) in both.items():
        by = wider(len(one.prompts))
        drawn_a[name], drawn_b[name] = (
            side.aggregate + by * (drawn[name] - side.aggregate) for side, drawn in ((one, drawn_a), (other, drawn_b))
        )
        result[name] = _difference(
            other.aggregate - one.aggregate, drawn_b[name] - drawn_a[name], swapped[name][1] - swapped[name][0],
            len(one.prompts),
        )  # fmt: skip
    if len(result) == 16:
        value = [totals({name: pair[side].aggregate for name, pair in both.items()}) for side in (0, 1)]
        spread = [totals({name: np.nan_to_num(d[name]) for name in both}) for d in (drawn_a, drawn_b)]
        null = [totals({name: np.nan_to_num(swapped[name][side]) for name in both}) for side in (0, 1)]
        count = len({prompt for one, _ in both.values() for prompt in one.prompts})
        few = min(len(one.prompts) for one, _ in both.values()) < FEWEST
        for key in Totals._fields:
            gap = [
                np.asarray(getattr(pair[1], key)) - np.asarray(getattr(pair[0], key)) for pair in (value, spread, null)
            ]
            result[key] = _difference(float(gap[0]), gap[1], gap[2], count, few=few)
    return result


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: of a family of tests.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _only(one: Sums, prompts: Sequence[str]) -> Sums:
    place = {prompt: i for i, prompt in enumerate(one.prompts)}
    keep = [place[prompt] for prompt in prompts]
    return Sums(prompts=tuple(prompts), value=one.value[keep], weight=one.weight[keep], n=one.n)


def _swapped(
    both: Mapping[str, tuple[Sums, Sums]], seed: int
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    suites = {suite: place for place, suite in enumerate(dict.fromkeys(one.prompts for one, _ in both.values()))}
    result = {}
    for name, (one, other) in both.items():
        rng = np.random.default_rng([seed, suites[one.prompts]])
        swap = rng.integers(0, 2, (PERMUTATIONS, len(one.prompts))).astype(np.float64)
        with np.errstate(invalid="ignore"):
            first = (one.value.sum() + swap @ (other.value - one.value)) / (
                one.weight.sum() + swap @ (other.weight - one.weight)
            )
            second = (other.value.sum() + swap @ (one.value - other.value)) / (
                other.weight.sum() + swap @ (one.weight - other.weight)
            )
        result[name] = (first, second)
    return result


def _difference(
    value: float, spread: NDArray[np.float64], null: NDArray[np.float64], prompts: int, *, few: bool = False
) -> Difference:
    null = null[~np.isnan(null)]
    reached = int((np.abs(null) >= abs(value) - 1e-12).sum())
    low, high = (None, None) if few or prompts < FEWEST else np.nanquantile(spread, [0.025, 0.975])
    return Difference(
        value=value, low=None if low is None else float(low), high=None if high is None else float(high),
        p_value=(1 + reached) / (1 + len(null)), n_prompts=prompts,
    )  # fmt: skip
