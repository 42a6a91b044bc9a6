"""Diversity of micro clips: how far apart clips of one prompt lie in what the prompt leaves open, against real clips.

What a caption leaves open is read off the pixels by the judges, in five groups: *place* (of the objects), *size*
(radius of the objects), *motion* (displacement along and across), *background* (luminance, tint, gradient, contrast,
period and orientation of stripes) and *phase* (of stripes). For each number, take the mean absolute difference over all
pairs of clips of one prompt, and divide by the same mean over real clips of the same prompts. A group's diversity is
the mean over its numbers, and diversity is the mean over the groups: 1 is as diverse as the world, 0 is one clip over
and over, and k equally likely modes give about 1 - 1/k. A number that cannot be read (a smear has no radius) is left
out of its pairs, so look at alignment too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from students.micro.world import Attributes
from tmd_eval.micro_judges import Body, Reading

METRIC_VERSION = "micro-diversity-1"
NAMES = {
    "place": ("first x", "first y", "second x", "second y"),
    "size": ("first radius", "second radius"),
    "motion": ("along", "across"),
    "background": (
        "level", "tint red", "tint green", "tint blue", "gradient x", "gradient y",
        "contrast", "orientation", "period",
    ),
    "phase": ("phase sine", "phase cosine"),
}  # fmt: skip
"""The numbers of each group. Place is the centre at mid-clip, in pixels. Gradients and stripes exclude each other."""
GROUPS = tuple(NAMES)
_GROUP_OF = np.array([i for i, group in enumerate(GROUPS) for _ in NAMES[group]])


def nuisances(reading: Reading, stated: Attributes) -> np.ndarray:
    """The numbers of ``NAMES`` in order, NaN where the caption has none or the clip does not show it."""
    first = next((b for b in reading.bodies if b.color == stated.color), None)
    second = next((b for b in reading.bodies if b.color == stated.color2), None)
    if first is not None and first.color == stated.color2:
        second = None

    def of(body: Body | None) -> list[float]:
        readable = body is not None and body.shape is not None
        return [*body.centers.mean(0), body.radius] if body is not None and readable else [np.nan] * 3

    x1, y1, r1 = of(first)
    x2, y2, r2 = of(second)
    along = across = np.nan
    if first is not None and reading.direction is not None:
        axis = 0 if reading.direction in ("left", "right") else 1
        along, across = abs(first.travel[axis]), first.travel[1 - axis]
    surface = [np.nan] * len(NAMES["background"] + NAMES["phase"])
    b = reading.background
    if b.kind == stated.background:
        striped = b.kind == "striped"
        turn = 2 * np.pi * b.phase
        slope = [np.nan] * 2 if striped else [b.amplitude * np.cos(b.angle), b.amplitude * np.sin(b.angle)]
        bands = [b.amplitude, b.angle, b.period, np.sin(turn), np.cos(turn)] if striped else [np.nan] * 5
        surface = [b.level, *b.tint, *slope, *bands]
    return np.array([x1, y1, x2, y2, r1, r2, along, across, *surface])


def pair_sums(vectors: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of absolute differences over the pairs of each prompt, and how many pairs could be read.

    Args:
        vectors: (n, d), NaN where unread.
        clusters: (n,) number of the prompt of each row, 0 to P - 1.

    Returns:
        Sums and counts, both (P, d).
    """
    prompts = int(clusters.max()) + 1
    sums, counts = np.zeros((prompts, vectors.shape[1])), np.zeros((prompts, vectors.shape[1]))
    for prompt in range(prompts):
        own = vectors[clusters == prompt]
        i, j = np.triu_indices(len(own), 1)
        difference = np.abs(own[i] - own[j])
        sums[prompt], counts[prompt] = np.nansum(difference, 0), np.isfinite(difference).sum(0)
    return sums, counts


def _ratios(
    weights: np.ndarray, made: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Diversity (first column) and that of each group, (R, 1 + groups), for rows of prompt weights (R, P)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        true = (weights @ real[0]) / (weights @ real[1])
        ratio = (weights @ made[0]) / (weights @ made[1]) / true
        exists = np.isfinite(true) & (true > 0)  # these prompts have such a number
        known = exists & np.isfinite(ratio)
        member = (_GROUP_OF[:, None] == np.arange(len(GROUPS))).astype(float)
        groups = (np.where(known, ratio, 0) @ member) / (known @ member)
        counted = exists @ member > 0
        overall = np.where(counted, groups, 0).sum(1) / counted.sum(1)
    return np.concatenate([overall[:, None], groups], axis=1)


def diversity(
    made: np.ndarray, real: np.ndarray, clusters: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> dict[str, tuple[float, float, float]]:
    """Diversity of made clips relative to real ones, with 95 % bootstrap intervals that resample prompts.

    Args:
        made: (n, d) of :func:`nuisances`.
        real: (n, d), row i of the same prompt as row i of ``made``.
        clusters: (n,) number of the prompt of each row, 0 to P - 1.
        seed: of the resampling.
        resamples: number of resampled sets.

    Returns:
        (value, low, high) for "diversity" and "diversity_<group>" of each group; what cannot be measured (no prompt
        with two readable clips) is absent.
    """
    sums = pair_sums(made, clusters), pair_sums(real, clusters)
    prompts = int(clusters.max()) + 1
    value = _ratios(np.ones((1, prompts)), *sums)[0]
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    spread = _ratios(drawn.astype(float), *sums)
    result = {}
    for i, name in enumerate(["diversity", *(f"diversity_{group}" for group in GROUPS)]):
        usable = spread[np.isfinite(spread[:, i]), i]
        if np.isfinite(value[i]) and len(usable):
            low, high = np.quantile(usable, [0.025, 0.975])
            result[name] = (float(value[i]), float(low), float(high))
    return result


def nuisance_table(readings: Sequence[Reading], stated: Sequence[Attributes]) -> np.ndarray:
    """Stack :func:`nuisances` of many clips, (n, d)."""
    return np.stack([nuisances(r, a) for r, a in zip(readings, stated, strict=True)])
