"""Fidelity of micro clips: a Fréchet distance to real clips of the same captions, in a feature made of pixels.

The feature (48 numbers a clip, no weights) has two parts:

- *layout*, 32 numbers: RGB pooled to 3 spans of time x 8 x 8 places, projected on the first 32 principal components of
  ``BASIS_CLIPS`` real training clips made with ``BASIS_SEED``;
- *surface*, 16 numbers: ``SURFACE`` lists them; they see over-saturation (chroma, clipped channels), blur and wrong
  texture (gradients, Laplacian), flicker and frozen motion (differences in time).

Each number is standardised by its mean and standard deviation over those same basis clips, so that a distance of 1 is
one (real) standard deviation in one number, squared. With mean mu and covariance S of two sets of features,

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).

FD of finite sets depends on n: always set it beside the distance of real clips to real clips at the same n.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from students.micro.world import make_clip, parse_caption, render, sample_scene

METRIC_VERSION = "micro-frechet-1"
BASIS_SEED, BASIS_CLIPS = 20_261, 1024
REFERENCE_SEED, SECOND_SEED = 20_262, 20_263  # real clips a set is compared with; the second real set of real-to-real
LAYOUT = 32
SURFACE = (
    "luminance mean", "luminance std", "luminance 1 %", "luminance 99 %",
    "chroma mean", "chroma 50 %", "chroma 95 %", "chroma 99 %", "share of pixels with chroma above 0.42",
    "log share of channels within 1 % of 0 or 1", "saturation (chroma over largest channel) 95 %",
    "gradient mean", "gradient 95 %", "log energy of the Laplacian over that of the gradient",
    "log difference in time", "difference in time 99 %",
)  # fmt: skip
"""Luminance: mean of RGB. Chroma: max - min of RGB. Gradient: length of the luminance step to the right and down
neighbour. Difference in time: absolute, between frames, mean of RGB. Percentages are quantiles over all pixels; "share"
and "difference in time" are means. Logarithms of shares and differences are of (x + 0.01): real clips have so little of
these two that on a plain scale a change nobody sees would outweigh all else."""


def _as_float(clips: np.ndarray) -> np.ndarray:
    return clips.astype(np.float32) / 255 if clips.dtype == np.uint8 else np.clip(clips, 0, 1).astype(np.float32)


def _layout(clip: np.ndarray) -> np.ndarray:
    time, height, width, _ = clip.shape
    spans = np.array_split(np.arange(time), 3)
    small = clip.reshape(time, 8, height // 8, 8, width // 8, 3).mean((2, 4))
    return np.stack([small[span].mean(0) for span in spans]).ravel()


def _surface(clip: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(clip, -1, 0).copy()  # channel by channel: numpy is slow over a last axis of 3
    luminance = (red + green + blue) / 3
    top = np.maximum(np.maximum(red, green), blue)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    saturation = chroma / np.maximum(top, 0.05)
    right, down = np.diff(luminance, axis=2)[:, :-1], np.diff(luminance, axis=1)[:, :, :-1]
    gradient = np.hypot(right, down)
    inner = luminance[:, 1:-1, 1:-1]
    around = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    sharpness = np.log(((around - 4 * inner) ** 2).mean() + 1e-6) - np.log((gradient**2).mean() + 1e-6)
    change = sum(np.abs(np.diff(channel, axis=0)) for channel in (red, green, blue)) / np.float32(3)
    return np.array(
        [
            luminance.mean(), luminance.std(), *np.quantile(luminance, [0.01, 0.99]),
            chroma.mean(), *np.quantile(chroma, [0.5, 0.95, 0.99]), (chroma > 0.42).mean(),
            np.log(((clip < 0.01) | (clip > 0.99)).mean() + 0.01), np.quantile(saturation, 0.95),
            gradient.mean(), np.quantile(gradient, 0.95), sharpness,
            np.log(change.mean() + 0.01), np.quantile(change, 0.99),
        ]
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Basis:
    mean: np.ndarray  # of the pooled RGB
    components: np.ndarray  # (LAYOUT, 576)
    center: np.ndarray  # of all 48 numbers
    scale: np.ndarray


@lru_cache(maxsize=1)
def _basis() -> _Basis:
    clips = [quantize(make_clip((BASIS_SEED, i), held_out=False)[1]) for i in range(BASIS_CLIPS)]
    pooled = np.stack([_layout(_as_float(c)) for c in clips]).astype(np.float64)
    surface = np.stack([_surface(_as_float(c)) for c in clips])
    mean = pooled.mean(0)
    _, vectors = np.linalg.eigh(np.cov(pooled, rowvar=False))  # ascending
    components = vectors[:, ::-1][:, :LAYOUT].T
    raw = np.concatenate([(pooled - mean) @ components.T, surface], axis=1)
    return _Basis(mean=mean, components=components, center=raw.mean(0), scale=np.maximum(raw.std(0), 1e-3))


def quantize(clip: np.ndarray) -> np.ndarray:
    """A float clip in [0, 1] as uint8, the way videos hold it."""
    return np.rint(np.clip(clip, 0, 1) * 255).astype(np.uint8)


def features(clips: Sequence[np.ndarray]) -> np.ndarray:
    """The feature of each clip, float64 (n, 48).

    Args:
        clips: each (T, 32, 32, 3) with T at least 3, uint8 or float RGB in [0, 1].
    """
    basis = _basis()
    rows = []
    for clip in clips:
        pixels = _as_float(clip)
        rows.append(np.concatenate([(_layout(pixels) - basis.mean) @ basis.components.T, _surface(pixels)]))
    return (np.stack(rows) - basis.center) / basis.scale


def real_clips(captions: Sequence[str], seed: int = REFERENCE_SEED) -> list[np.ndarray]:
    """One real clip (uint8) for each caption; the k-th clip of a caption is the same whatever else is in the list."""
    clips, seen = [], Counter[str]()
    for caption in captions:
        rng = np.random.default_rng((seed, zlib.crc32(caption.encode()), seen[caption]))
        seen[caption] += 1
        clips.append(quantize(render(sample_scene(rng, parse_caption(caption)))))
    return clips


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _moments(sample: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (unbiased) covariance of rows counted ``weights`` times."""
    n = weights.sum()
    mean = weights @ sample / n
    centered = sample - mean
    return mean, (centered * weights[:, None]).T @ centered / (n - 1)


def frechet_distance(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None, second_weights: np.ndarray | None = None
) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

    The trace of (S_1 S_2)^(1/2) is the sum of the square roots of the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which is
    symmetric, so no complex matrix square root is needed.

    Args:
        first: (n, d), at least two rows.
        second: (m, d), at least two rows.
        weights: how often each row of the first counts; all once by default.
        second_weights: how often each row of the second counts; all once by default.
    """
    mean_1, cov_1 = _moments(first, np.ones(len(first)) if weights is None else weights)
    mean_2, cov_2 = _moments(second, np.ones(len(second)) if second_weights is None else second_weights)
    root = _root(cov_1)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_2 @ root), 0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross)


def frechet_interval(
    first: np.ndarray, second: np.ndarray, clusters: np.ndarray, *, seed: int = 0, resamples: int = 200
) -> tuple[float, float, float]:
    """Fréchet distance with a 95 % bootstrap interval that resamples prompts.

    Row i of both sets belongs to the same prompt, and both are resampled together. A resample holds repeats, which
    lengthens every distance; so the spread of the resampled distances is taken, not their place: the interval is the
    value plus the 2.5 % and 97.5 % quantiles of (resampled - their mean), cut at 0.

    Args:
        first: (n, d) features.
        second: (n, d), row i of the same caption as row i of the first.
        clusters: (n,) number of the prompt of each row, 0 to P - 1.
        seed: of the resampling.
        resamples: number of resampled sets.

    Returns:
        Value, low, high.
    """
    value = frechet_distance(first, second)
    rng = np.random.default_rng(seed)
    prompts = int(clusters.max()) + 1
    draws = []
    for _ in range(resamples):
        weights = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)[clusters].astype(float)
        draws.append(frechet_distance(first, second, weights, weights))
    low, high = np.quantile(np.array(draws) - np.mean(draws), [0.025, 0.975])
    return value, max(0.0, value + float(low)), value + float(high)
