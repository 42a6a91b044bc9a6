"""Reading the background of a micro-world clip: kind, luminance, tint, gradient or stripes, by masked least squares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from students.micro.world import SIZE

MIN_SHARE = 0.25
"""Share of the frame that must be seen clear of objects for a background to be read at all."""
MAX_TEXTURE = 0.06
"""Root mean square of what the model of a kind leaves unexplained, RGB units: above it the kind is None."""
MAX_FLICKER = 0.06
"""Root mean square deviation of background pixels from their mean over time: above it the kind is None."""
FLAT = (
    0.14  # luminance amplitude of a gradient: below it dark or light (at most 0.06 in the world), above shaded (0.25)
)
DARK, LIGHT = 0.36, 0.66  # luminance at the middle: real dark <= 0.30, shaded 0.42 to 0.58, light >= 0.72
MIN_CONTRAST = 0.12  # of stripes, half of it each side; the smallest difference of two stripes in the world is 0.36
MIN_GAIN = 0.5  # stripes must leave less than this share of the plane's squared residual

_AXIS = (np.arange(SIZE) + 0.5 - SIZE / 2) / (SIZE / 2)
_PLANE = np.stack([np.ones((SIZE, SIZE)), *np.meshgrid(_AXIS, _AXIS)], axis=-1).reshape(-1, 3)


@dataclass(frozen=True, kw_only=True)
class Background:
    """What was read off the background; numbers are NaN where the kind has none."""

    kind: str | None
    """One of the world's four kinds, or None where no kind explains the pixels."""
    level: float
    """Luminance at the middle of the frame (of stripes: mean of the two levels), 0 to 1."""
    amplitude: float
    """Luminance amplitude of the gradient, or half the difference of the two stripes, 0 to 1."""
    tint: tuple[float, float, float]
    """RGB factor, the largest is 1."""
    angle: float
    """Direction in which luminance grows; of stripes 0 (vertical) or pi/2 (horizontal), radians."""
    period: float
    """Period of stripes, pixels."""
    phase: float
    """Phase of stripes, share of a period."""
    texture: float
    """Root mean square of what the chosen model leaves unexplained, RGB units."""
    flicker: float
    """Root mean square deviation from the mean over time, RGB units."""


@lru_cache(maxsize=1)
def _stripes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Periods, phases and profiles (K, SIZE) of all stripe patterns tried, each in [-1, 1]."""
    period, phase = (a.ravel() for a in np.meshgrid(np.arange(9, 21.01, 0.25), np.arange(64) / 64, indexing="ij"))
    position = np.arange(SIZE) + 0.5
    turn = np.arcsin(np.sin(2 * np.pi * (position / period[:, None] + phase[:, None])))
    return period, phase, 2 * np.clip(period[:, None] / (2 * np.pi) * turn, -0.5, 0.5)


def _fit_stripes(luminance: np.ndarray, seen: np.ndarray) -> tuple[float, dict[str, float], np.ndarray]:
    """Best stripe pattern: its squared residual, its parameters, its luminance image (SIZE, SIZE)."""
    period, phase, waves = _stripes()
    best: tuple[float, dict[str, float], np.ndarray] = (np.inf, {}, luminance)
    for axis, angle in ((0, 0.0), (1, np.pi / 2)):  # mean over y leaves a profile along x: vertical stripes
        count = seen.sum(axis).astype(float)
        total = (luminance * seen).sum(axis)
        n, s = count.sum(), total.sum()
        w1, w2, wp = waves @ count, waves**2 @ count, waves @ total
        spread = w2 - w1**2 / n
        covariance = wp - w1 * s / n
        k = int(np.argmax(np.where(spread > 1e-9, covariance**2 / np.maximum(spread, 1e-9), 0)))
        if spread[k] <= 1e-9:
            continue
        slope = covariance[k] / spread[k]
        middle = (s - slope * w1[k]) / n
        profile = middle + slope * waves[k]
        image = np.broadcast_to(profile[None, :] if axis == 0 else profile[:, None], (SIZE, SIZE))
        residual = float((((luminance - image) * seen) ** 2).sum())
        if residual < best[0]:  # a negative slope is the same pattern half a period on
            turned = float((phase[k] + (0.5 if slope < 0 else 0.0)) % 1)
            values = dict(
                level=float(middle), amplitude=abs(float(slope)), angle=angle, period=float(period[k]), phase=turned
            )
            best = (residual, values, image)
    return best


def _fit_plane(luminance: np.ndarray, seen: np.ndarray) -> tuple[float, dict[str, float], np.ndarray]:
    """Best clipped plane: its squared residual, its parameters, its luminance image (SIZE, SIZE)."""
    flat = luminance.ravel()
    inside = seen.ravel() & (flat > 0.02) & (flat < 0.98)  # the world clips a gradient that leaves [0, 1]
    if inside.sum() < 20:
        inside = seen.ravel()
    a = _PLANE[inside]
    middle, dx, dy = np.linalg.lstsq(a.T @ a, a.T @ flat[inside], rcond=None)[0]
    image = np.clip(_PLANE @ np.array([middle, dx, dy]), 0, 1).reshape(SIZE, SIZE)
    residual = float((((luminance - image) * seen) ** 2).sum())
    values = dict(
        level=float(middle), amplitude=float(np.hypot(dx, dy)), angle=float(np.arctan2(dy, dx) % (2 * np.pi)),
        period=np.nan, phase=np.nan,
    )  # fmt: skip
    return residual, values, image


def read_background(clip: np.ndarray, clear: np.ndarray) -> tuple[Background, np.ndarray]:
    """Read the background and fill it in behind the objects.

    Args:
        clip: (T, SIZE, SIZE, 3), RGB in [0, 1].
        clear: (T, SIZE, SIZE) bool, pixels that show background and nothing else.

    Returns:
        The reading, and the background image (SIZE, SIZE, 3): the mean over the clear frames where there are any, the
        fitted model elsewhere.
    """
    count = clear.sum(0)
    seen = count > 0
    mean = (clip * clear[..., None]).sum(0) / np.maximum(count, 1)[..., None]
    if seen.mean() < MIN_SHARE:
        nothing = dict.fromkeys(("level", "amplitude", "angle", "period", "phase", "texture", "flicker"), np.nan)
        return Background(kind=None, tint=(1.0, 1.0, 1.0), **nothing), np.where(seen[..., None], mean, 0.5)
    sums = mean[seen].sum(0)
    tint = sums / sums.max() if sums.max() > 1e-6 else np.ones(3)
    luminance = mean @ tint / (tint @ tint)
    plane, stripes = _fit_plane(luminance, seen), _fit_stripes(luminance, seen)
    striped = stripes[0] < MIN_GAIN * plane[0] and stripes[1]["amplitude"] > MIN_CONTRAST / 2
    _, values, image = stripes if striped else plane
    model = image[..., None] * tint
    texture = float(np.sqrt(np.mean((mean[seen] - model[seen]) ** 2)))
    flicker = float(np.sqrt((((clip - mean) ** 2).mean(-1) * clear).sum() / clear.sum()))
    kind: str | None = None
    if striped:
        kind = "striped"
    elif values["amplitude"] >= FLAT:
        kind = "shaded" if DARK < values["level"] < LIGHT else None
    elif values["level"] < DARK:
        kind = "dark"
    elif values["level"] > LIGHT:
        kind = "light"
    if texture > MAX_TEXTURE or flicker > MAX_FLICKER:
        kind = None
    red, green, blue = (float(v) for v in tint)
    reading = Background(kind=kind, tint=(red, green, blue), texture=texture, flicker=flicker, **values)
    return reading, np.where(seen[..., None], mean, model)
