"""Exact judges of the micro world: every attribute of a caption, read from pixels alone, without weights.

How a clip is read, by analysis and synthesis:

1. Objects are saturated (chroma = max - min of RGB at least 0.68), backgrounds are not (at most 0.2): pixels above
   ``STRONG`` are sorted by hue, and each hue with enough of them is an object.
2. The background is read where no object is near (:mod:`tmd_eval.micro_background`).
3. Each object's share of each pixel follows by least squares from its own RGB and the background's.
4. Each of the four shapes is rendered onto that share, its centre free in each frame and its radius common to all, and
   fitted; the smallest residual names the shape, and none is named where even that leaves more than ``MAX_RESIDUAL``.
5. Direction and speed come from a straight line through the centres, the relation from the places across the motion.

Thresholds sit between what the world holds and what it does not; they were set on training clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from students.micro.world import DRIFT, HUES, RELATIONS, SHAPES, SIZE, Attributes, coverage, parse_caption
from tmd_eval.micro_background import Background, read_background

METRIC_VERSION = "micro-judge-1"
STRONG = 0.42  # chroma above which a pixel belongs to an object
PALE = 0.30  # chroma below which a pixel may be background
MIN_CHROMA = 0.55
"""Chroma of the inner pixels of an object, below which it is a ghost and not counted; the world's least is 0.68."""
MIN_MASS, MIN_EXTRA = 9.0, 5.0
"""Strong pixels a frame (mean) from which a hue is an object; from which anything else is one object too many."""
MAX_RESIDUAL = 0.08
"""Squared residual of the fitted shape over the shape's own square sum: real clips leave at most 0.02, those blurred by
1 pixel 0.05, by 3 pixels 0.06 to 0.13."""
SOFT = 0.107
"""Weight of either neighbour in the blur (about 0.5 pixel) on rendered shapes: between the sharp edges of the world and
the soft ones of a decoder, so that both are told apart best."""
SLOWLY, QUICKLY = (3.5, 10.0), (13.0, 21.0)
"""Displacement over the clip, pixels: the world's 5 to 8 and 15 to 19 with a margin; in between is neither."""
MAX_ACROSS = DRIFT + 1.5  # displacement across the motion, pixels
MAX_BEND = 1.2  # root mean square distance of the centres from a straight, even motion, pixels
MAX_STILL = 2.5  # displacement of the object that stands still, pixels
MASS_RANGE = (0.6, 1.5)  # area in each frame over its median: outside, the object appears, vanishes or is torn

_AREA = {
    "circle": np.pi,
    "square": 4 * 0.886**2,
    "triangle": 0.75 * np.sqrt(3) * 1.4**2,
    "cross": 8 * 1.15 * 0.42 - 4 * 0.42**2,
}
_HALF = 9  # half of the window around an object; the largest object reaches 6.8 + 2 pixels from its centroid
_OFFSET = np.arange(-_HALF, _HALF + 1)


@dataclass(frozen=True, kw_only=True)
class Body:
    """One object as read."""

    color: str
    shape: str | None
    """None where no shape fits."""
    residual: float
    """Of the best shape, see ``MAX_RESIDUAL``."""
    radius: float
    """In the world's sense, pixels."""
    centers: np.ndarray
    """(T, 2), x and y in pixels."""
    travel: tuple[float, float]
    """Displacement over the clip by a straight line through the centres, pixels."""
    bend: float
    """Root mean square distance of the centres from that line's even motion, pixels."""
    present: bool
    """Of about the same area in every frame."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All that was read off a clip; None for an attribute that cannot be told."""

    bodies: tuple[Body, ...]
    """At most two, the one that moves more first."""
    extra: bool
    """There is more than the bodies: a further colour, one of their colours elsewhere, or a ghost."""
    background: Background
    direction: str | None
    speed: str | None
    relation: str | None

    @property
    def count(self) -> int | None:
        """Number of objects; None where something saturated is left that is no object."""
        return None if self.extra else len(self.bodies)


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Grow (T, H, W) by one pixel in each of eight directions."""
    for axis in (1, 2):
        grown = mask.copy()
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        grown[tuple(low)] |= mask[tuple(high)]
        grown[tuple(high)] |= mask[tuple(low)]
        mask = grown
    return mask


def _nearest_hue(rgb: np.ndarray, top: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Index into ``HUES`` of the nearest hue of each pixel (N, 3)."""
    red, green, blue = rgb.T
    c = np.maximum(chroma, 1e-6)
    sector = np.where(
        top == red, (green - blue) / c, np.where(top == green, 2 + (blue - red) / c, 4 + (red - green) / c)
    )
    away = np.abs((sector / 6)[:, None] - np.array(list(HUES.values())))
    return np.minimum(away % 1, 1 - away % 1).argmin(1)


def _shares(clip: np.ndarray, background: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Share (K, T, H, W) of each pixel that each of K objects covers.

    Objects lie apart, so a pixel mixes the background with one object: the one whose RGB explains it best. (Solving for
    both at once fails where background and two complementary colours lie on one line.)
    """
    difference = clip - background
    towards = colors[:, None, None] - background  # (K, H, W, 3)
    share = np.einsum("thwc,khwc->kthw", difference, towards) / (towards**2).sum(-1)[:, None]
    share = np.clip(share, 0, 1)
    left = ((difference - share[..., None] * towards[:, None]) ** 2).sum(-1)
    return np.where(left == left.min(0), share, 0)


def _windows(share: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(T, 19, 19) windows of a share (T, H, W) around integer centres (T, 2) given as x, y."""
    padded = np.pad(share, ((0, 0), (_HALF, _HALF), (_HALF, _HALF)))
    rows = corners[:, 1, None] + np.arange(2 * _HALF + 1)
    columns = corners[:, 0, None] + np.arange(2 * _HALF + 1)
    return padded[np.arange(len(share))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _render(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coverage with slightly soft edges, (T, 19, 19)."""
    image = coverage(shape, radius, x, y)
    for axis in (1, 2):
        before, after = np.roll(image, 1, axis), np.roll(image, -1, axis)  # the window's rim is empty
        image = (1 - 2 * SOFT) * image + SOFT * (before + after)
    return image


def _fit_shape(shape: str, window: np.ndarray, middle: np.ndarray, mass: float) -> tuple[float, float, np.ndarray]:
    """Fit one shape by Gauss-Newton steps, centre per frame and one radius.

    Args:
        shape: its name.
        window: (T, 19, 19) shares.
        middle: (T, 2) centroids relative to the window's central pixel.
        mass: area in pixels.

    Returns:
        Normalised residual, radius, centres (T, 2) relative to the window's central pixel.
    """
    radius = float(np.sqrt(mass / _AREA[shape]))
    center = middle - [0, 0.35 * radius if shape == "triangle" else 0]  # the world centres a triangle's bounding box
    best = (np.inf, radius, center)
    for _ in range(5):
        x, y = _OFFSET - center[:, 0, None, None], _OFFSET[:, None] - center[:, 1, None, None]
        x, y = np.broadcast_arrays(x, y)
        model = _render(shape, radius, x, y)
        difference = window - model
        residual = float((difference**2).sum() / max((model**2).sum(), 1e-6))
        converged = residual > 0.97 * best[0]
        if residual < best[0]:
            best = (residual, radius, center)
        if converged:
            break
        by_y, by_x = (-g for g in np.gradient(model, axis=(1, 2)))
        by_r = _render(shape, radius + 0.5, x, y) - _render(shape, max(radius - 0.5, 0.1), x, y)
        basis = np.stack([by_x, by_y], axis=-1).reshape(len(window), -1, 2)
        gram = basis.transpose(0, 2, 1) @ basis + 1e-3 * np.eye(2)
        step = np.linalg.solve(gram, basis.transpose(0, 2, 1) @ difference.reshape(len(window), -1, 1))[..., 0]
        center = center + np.clip(step, -1, 1)
        radius = float(np.clip(radius + (by_r * difference).sum() / max((by_r**2).sum(), 1e-6), 1.0, 9.0))
    return best


def _read_body(color: str, share: np.ndarray) -> tuple[Body, float]:
    """Fit the four shapes to one object's share (T, H, W); also the share left outside its window, pixels a frame."""
    kept = np.where(share > 0.2, share, 0)
    mass = kept.sum((1, 2))
    pixel = np.arange(SIZE)
    safe = np.maximum(mass, 1e-6)
    centroid = np.stack([kept.sum(1) @ pixel / safe, kept.sum(2) @ pixel / safe], axis=1)  # pixel (0, 0) is at 0 here
    anchor = np.clip(np.rint(centroid), 0, SIZE - 1).astype(int)
    window = _windows(share, anchor)
    fits = {s: _fit_shape(s, window, centroid - anchor, float(np.median(mass))) for s in SHAPES}
    shape = min(fits, key=lambda s: fits[s][0])
    residual, radius, center = fits[shape]
    places = center + anchor + 0.5  # the world's pixel centres lie at 0.5
    time = np.linspace(-0.5, 0.5, len(share))
    slope = time @ places / (time @ time)
    bend = float(np.sqrt(((places - places.mean(0) - time[:, None] * slope) ** 2).sum(1).mean()))
    typical = float(np.median(mass))
    present = bool(np.all(mass > MASS_RANGE[0] * typical) and np.all(mass < MASS_RANGE[1] * typical))
    x, y = pixel + 0.5 - places[:, 0, None], pixel + 0.5 - places[:, 1, None]
    far = np.hypot(x[:, None, :], y[:, :, None]) > 1.5 * radius + 1.5
    outside = float(((share > 0.5) & far).sum((1, 2)).mean())
    body = Body(
        color=color, shape=shape if residual <= MAX_RESIDUAL else None, residual=residual, radius=radius,
        centers=places, travel=(float(slope[0]), float(slope[1])), bend=bend, present=present,
    )  # fmt: skip
    return body, outside


def _motion(body: Body) -> tuple[str | None, str | None, int]:
    """Direction, speed and axis (0: x, 1: y) of the motion of one object."""
    axis = int(abs(body.travel[1]) > abs(body.travel[0]))
    along, across = body.travel[axis], body.travel[1 - axis]
    if not body.present or abs(along) < SLOWLY[0] or abs(across) > MAX_ACROSS or body.bend > MAX_BEND:
        return None, None, axis
    direction = (("left", "right"), ("up", "down"))[axis][along > 0]
    speeds = {"slowly": SLOWLY, "quickly": QUICKLY}
    return direction, next((s for s, (low, high) in speeds.items() if low <= abs(along) <= high), None), axis


def _relation(mover: Body, still: Body, axis: int) -> str | None:
    """Where the mover is, seen from the still object, across the mover's motion; the same in every frame."""
    if not (mover.present and still.present) or float(np.hypot(*still.travel)) > MAX_STILL:
        return None
    offset = mover.centers[:, 1 - axis] - still.centers[:, 1 - axis]
    sign = int(np.sign(offset[0]))
    if (sign * offset).min() < 0.7 * (mover.radius + still.radius):
        return None
    where = (sign, 0) if axis == 1 else (0, sign)
    return next(name for name, place in RELATIONS.items() if place == where)


def read_attributes(clip: np.ndarray) -> Reading:
    """Read a clip.

    Args:
        clip: (T, 32, 32, 3) with T at least 2: uint8, or float RGB in [0, 1].

    Raises:
        ValueError: the array has another shape.
    """
    if clip.ndim != 4 or clip.shape[1:] != (SIZE, SIZE, 3) or len(clip) < 2:
        raise ValueError(f"A micro clip has shape (T, {SIZE}, {SIZE}, 3) with T >= 2, not {clip.shape}.")
    pixels = clip.astype(np.float64) / 255 if clip.dtype == np.uint8 else np.clip(clip.astype(np.float64), 0, 1)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    top = np.maximum(np.maximum(red, green), blue)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    background, behind = read_background(pixels, ~_dilate(chroma > PALE))
    strong = chroma > STRONG
    rgb, strength = pixels[strong], chroma[strong]
    hue = _nearest_hue(rgb, top[strong], strength)
    mass = np.bincount(hue, minlength=len(HUES)) / len(clip)
    colors: dict[str, np.ndarray] = {}
    for k in np.argsort(-mass)[:2]:
        if mass[k] >= MIN_MASS:
            own = strength[hue == k]
            core = own >= 0.85 * np.quantile(own, 0.8)
            color = np.median(rgb[hue == k][core], axis=0)
            if np.ptp(color) >= MIN_CHROMA:
                colors[list(HUES)[k]] = color
    extra = bool(mass.sum() - sum(mass[list(HUES).index(c)] for c in colors) >= MIN_EXTRA)
    if not colors:
        return Reading(bodies=(), extra=extra, background=background, direction=None, speed=None, relation=None)
    found = [
        _read_body(c, s) for c, s in zip(colors, _shares(pixels, behind, np.stack(list(colors.values()))), strict=True)
    ]
    extra |= any(outside >= MIN_EXTRA for _, outside in found)
    bodies = tuple(sorted((b for b, _ in found), key=lambda b: -float(np.hypot(*b.travel))))
    direction, speed, axis = _motion(bodies[0])
    relation = _relation(bodies[0], bodies[1], axis) if len(bodies) == 2 else None
    return Reading(
        bodies=bodies, extra=extra, background=background, direction=direction, speed=speed, relation=relation
    )


def compare(reading: Reading, stated: Attributes) -> dict[str, bool]:
    """Which of the stated attributes a reading shows; see :func:`judge`."""
    first = reading.bodies[0] if reading.bodies else None
    result = {
        "color": first is not None and first.color == stated.color,
        "shape": first is not None and first.shape == stated.shape,
        "direction": reading.direction == stated.direction,
        "speed": reading.speed == stated.speed,
        "background": reading.background.kind == stated.background,
        "count": reading.count == (2 if stated.relation else 1),
    }
    if stated.relation:
        second = reading.bodies[1] if len(reading.bodies) > 1 else None
        result["color2"] = second is not None and second.color == stated.color2
        result["shape2"] = second is not None and second.shape == stated.shape2
        result["relation"] = reading.relation == stated.relation
    result["joint"] = all(result.values())
    return result


def judge(clip: np.ndarray, caption: str) -> dict[str, bool]:
    """Which attributes of a caption a clip shows.

    Args:
        clip: (T, 32, 32, 3), uint8 or float RGB in [0, 1].
        caption: of the micro world.

    Returns:
        True or False for "color", "shape", "direction", "speed", "background", "count", for a caption with two objects
        also "color2", "shape2", "relation", and "joint": all of them.

    Raises:
        ValueError: the text is no caption of the micro world, or the clip has another shape.
    """
    return compare(read_attributes(clip), parse_caption(caption))
