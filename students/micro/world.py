"""The micro world: captioned clips of coloured shapes, generated, exact, endless.

A clip shows one or two flat-coloured objects on a background. The first object moves at constant velocity; the second,
if any, stands still. Objects never overlap and never leave the frame. What the caption says is the *attributes* of
:class:`Attributes`; everything else (places, sizes, shades, background tint, gradient, stripe period and phase) is a
continuous nuisance variable drawn afresh for each clip, so that a caption leaves most of the pixels open.

    "a red circle moves left slowly above a blue square on a striped background"

Units: pixels and frames; x grows to the right, y grows downwards; colours are RGB in [0, 1].
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from dataclasses import dataclass
from itertools import product

import numpy as np

SIZE = 32  # height and width of a clip, pixels
FRAMES = 5
FPS = 4

HUES = {"red": 0.0, "yellow": 55 / 360, "green": 120 / 360, "cyan": 180 / 360, "blue": 230 / 360, "magenta": 300 / 360}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": (5.0, 8.0), "quickly": (15.0, 19.0)}
"""Displacement over the clip, pixels: range of a uniform law, its upper end cut where the object would leave."""
BACKGROUNDS = ("dark", "light", "striped", "shaded")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
"""Where the mover is, seen from the still object; always across the direction of motion, so it holds in every frame."""
RADIUS = (3.5, 5.6)
"""Object radius in pixels (radius of the circle of about equal area)."""
DRIFT = 1.5  # largest displacement across the stated direction, pixels

_CAPTION = re.compile(
    rf"a (?P<color>{'|'.join(HUES)}) (?P<shape>{'|'.join(SHAPES)}) moves (?P<direction>{'|'.join(DIRECTIONS)}) "
    rf"(?P<speed>{'|'.join(SPEEDS)})(?: (?P<relation>{'|'.join(RELATIONS)}) a (?P<color2>{'|'.join(HUES)}) "
    rf"(?P<shape2>{'|'.join(SHAPES)}))? on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """All that a caption states. ``relation``, ``color2`` and ``shape2`` are None for a clip of one object."""

    color: str
    shape: str
    direction: str
    speed: str
    background: str
    relation: str | None = None
    color2: str | None = None
    shape2: str | None = None

    @property
    def caption(self) -> str:
        second = f" {self.relation} a {self.color2} {self.shape2}" if self.relation else ""
        return (
            f"a {self.color} {self.shape} moves {self.direction} {self.speed}{second} on a {self.background} background"
        )


def parse_caption(text: str) -> Attributes:
    """The attributes a caption states.

    Raises:
        ValueError: the text is not a caption of the micro world.

    >>> parse_caption("a red circle moves up slowly on a dark background").shape
    'circle'
    """
    match = _CAPTION.fullmatch(text.strip())
    if not match:
        raise ValueError(
            f"{text!r} is not a caption of the micro world; write for example "
            '"a red circle moves left slowly above a blue square on a striped background".'
        )
    return Attributes(**match.groupdict())


def is_held_out(caption: str) -> bool:
    """True for the eighth of all captions that no training set may hold (by a hash of the text: it never changes)."""
    return hashlib.sha256(caption.encode()).digest()[0] % 8 == 0


def sample_attributes(rng: np.random.Generator, *, held_out: bool, two_objects: float = 0.5) -> Attributes:
    """Attributes drawn uniformly from one split; with probability ``two_objects`` there is a second object."""
    pick = lambda options: str(rng.choice(list(options)))  # noqa: E731
    while True:
        direction = pick(DIRECTIONS)
        first = dict(
            color=pick(HUES),
            shape=pick(SHAPES),
            direction=direction,
            speed=pick(SPEEDS),
            background=pick(BACKGROUNDS),
        )
        second = {}
        if rng.random() < two_objects:
            across = [r for r, (dx, _) in RELATIONS.items() if (dx == 0) == (DIRECTIONS[direction][1] == 0)]
            second = dict(
                relation=pick(across), color2=pick(c for c in HUES if c != first["color"]), shape2=pick(SHAPES)
            )
        attributes = Attributes(**first, **second)
        if is_held_out(attributes.caption) == held_out:
            return attributes


def all_attributes() -> list[Attributes]:
    """Every caption of the world, in a fixed order (768 of one object, 30,720 of two)."""
    one = [
        Attributes(color=c, shape=s, direction=d, speed=v, background=b)
        for c, s, d, v, b in product(HUES, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
    ]
    two = [
        Attributes(**{**vars(a), "relation": r, "color2": c, "shape2": s})
        for a in one
        for r, (dx, _) in RELATIONS.items()
        if (dx == 0) == (DIRECTIONS[a.direction][1] == 0)
        for c, s in product(HUES, SHAPES)
        if c != a.color
    ]
    return one + two


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip before rendering: the stated attributes and every nuisance variable."""

    attributes: Attributes
    radii: tuple[float, ...]
    """One radius an object, pixels."""
    start: tuple[float, float]
    """Centre (x, y) of the mover in the first frame, pixels."""
    travel: tuple[float, float]
    """Displacement (x, y) of the mover over the whole clip, pixels."""
    still: tuple[float, float] | None
    """Centre of the still object."""
    colors: tuple[tuple[float, float, float], ...]
    """RGB an object."""
    levels: tuple[float, float]
    """Luminance of the background: of stripes (dark, light), else (middle, amplitude of the gradient)."""
    tint: tuple[float, float, float]
    """RGB factor on the background."""
    angle: float
    """Direction of the gradient, or orientation of the stripes (0: vertical stripes, pi/2: horizontal), radians."""
    period: float
    phase: float
    """Period (pixels) and phase (share of a period) of stripes."""


def extent(shape: str, radius: float) -> float:
    """Half of the larger side of the shape's bounding box, pixels."""
    return radius * {"circle": 1.0, "square": 0.886, "triangle": 1.213, "cross": 1.15}[shape]


def _object_rgb(rng: np.random.Generator, color: str) -> tuple[float, float, float]:
    hue = HUES[color] + rng.uniform(-8, 8) / 360
    return colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.85, 1.0), rng.uniform(0.8, 1.0))


def sample_scene(rng: np.random.Generator, attributes: Attributes) -> Scene:
    """Draw every nuisance variable for the given attributes; objects stay inside the frame and apart."""
    shapes = [s for s in (attributes.shape, attributes.shape2) if s]
    radii = [float(rng.uniform(*RADIUS)) for _ in shapes]
    extents = [extent(s, r) for s, r in zip(shapes, radii, strict=True)]
    axis = 0 if DIRECTIONS[attributes.direction][0] else 1  # of motion
    sign = sum(DIRECTIONS[attributes.direction])
    low, high = SPEEDS[attributes.speed]
    distance = float(rng.uniform(low, min(high, SIZE - 1 - 2 * extents[0])))
    drift = float(rng.uniform(-DRIFT, DRIFT))
    # along the motion: the interval [begin, begin + distance] of the centre lies in the frame
    margin = extents[0] + 0.5
    begin = float(rng.uniform(margin, SIZE - margin - distance))
    start, travel = [0.0, 0.0], [0.0, 0.0]
    start[axis] = begin if sign > 0 else begin + distance
    travel[axis], travel[1 - axis] = sign * distance, drift
    # across the motion: the mover's band is [c, c + drift]; the still object lies wholly on the other side of it
    low_c, high_c = margin + max(0.0, -drift), SIZE - margin - max(0.0, drift)
    still = None
    if attributes.relation:
        side = sum(RELATIONS[attributes.relation])  # -1: the mover has the smaller coordinate
        apart = extents[0] + extents[1] + 1.0
        low_s, high_s = extents[1] + 0.5, SIZE - extents[1] - 0.5
        while True:  # rejection keeps both places uniform given that they are apart
            c, s = float(rng.uniform(low_c, high_c)), float(rng.uniform(low_s, high_s))
            nearest = c + (max(0.0, drift) if side < 0 else min(0.0, drift))
            if (s - nearest) * -side >= apart:
                break
        place = [0.0, 0.0]
        place[1 - axis], place[axis] = s, float(rng.uniform(low_s, high_s))
        start[1 - axis], still = c, (place[0], place[1])
    else:
        start[1 - axis] = float(rng.uniform(low_c, high_c))
    levels = {
        "dark": (rng.uniform(0.10, 0.30), rng.uniform(0, 0.06)),
        "light": (rng.uniform(0.72, 0.92), rng.uniform(0, 0.06)),
        "striped": (rng.uniform(0.20, 0.32), rng.uniform(0.68, 0.80)),
        "shaded": (rng.uniform(0.42, 0.58), rng.uniform(0.25, 0.40)),
    }[attributes.background]
    tint = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.2), 1.0)
    return Scene(
        attributes=attributes,
        radii=tuple(radii),
        start=(start[0], start[1]),
        travel=(travel[0], travel[1]),
        still=still,
        colors=tuple(_object_rgb(rng, c) for c in (attributes.color, attributes.color2) if c),
        levels=(float(levels[0]), float(levels[1])),
        tint=tint,
        angle=float(rng.integers(2) * np.pi / 2 if attributes.background == "striped" else rng.uniform(0, 2 * np.pi)),
        period=float(rng.uniform(14, 18)),
        phase=float(rng.random()),
    )


_Y, _X = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")


def coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers, in [0, 1].

    Args:
        shape: one of ``SHAPES``.
        radius: pixels.
        x: horizontal position of pixel centres relative to the shape's centre, pixels, any array shape.
        y: vertical position, the same array shape.

    The distance to the outline is exact along edges and clipped to one pixel's width: anti-aliasing.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    elif shape == "triangle":
        big = 1.4 * radius  # circumradius; the centre is that of the bounding box
        y = y - big / 4
        distance = np.maximum(y - big / 2, np.abs(x) * np.sqrt(3) / 2 - y / 2 - big / 2)
    else:
        long, short = 1.15 * radius, 0.42 * radius
        ax, ay = np.abs(x), np.abs(y)
        distance = np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    return np.clip(0.5 - distance, 0, 1)


def _wave(position: np.ndarray, period: float, phase: float) -> np.ndarray:
    """Anti-aliased square wave in [-1, 1]."""
    to_edge = period / (2 * np.pi) * np.arcsin(np.sin(2 * np.pi * (position / period + phase)))  # pixels, signed
    return np.clip(to_edge, -0.5, 0.5) * 2


def _background(scene: Scene) -> np.ndarray:
    first, second = scene.levels
    if scene.attributes.background == "striped":
        wave = _wave(_Y if scene.angle > 0 else _X, scene.period, scene.phase)
        luminance = first + (second - first) * (wave + 1) / 2
    else:
        ramp = (np.cos(scene.angle) * (_X - SIZE / 2) + np.sin(scene.angle) * (_Y - SIZE / 2)) / (SIZE / 2)
        luminance = first + second * ramp
    return np.clip(luminance, 0, 1)[..., None] * np.array(scene.tint)


def render(scene: Scene) -> np.ndarray:
    """The clip of a scene: float32 [FRAMES, SIZE, SIZE, 3], RGB in [0, 1]."""
    clip = np.repeat(_background(scene)[None], FRAMES, axis=0)
    fraction = np.linspace(0, 1, FRAMES)[:, None, None]
    places: list[tuple[np.ndarray | float, np.ndarray | float]] = [
        (scene.start[0] + fraction * scene.travel[0], scene.start[1] + fraction * scene.travel[1])
    ]
    if scene.still:
        places.append(scene.still)
    shapes = (scene.attributes.shape, scene.attributes.shape2)
    for (cx, cy), shape, radius, color in zip(places, shapes, scene.radii, scene.colors, strict=False):
        assert shape is not None
        alpha = np.broadcast_to(coverage(shape, radius, _X - cx, _Y - cy), clip.shape[:3])[..., None]
        clip = clip * (1 - alpha) + alpha * np.array(color)
    return clip.astype(np.float32)


def make_clip(seed: tuple[int, ...], *, held_out: bool, two_objects: float = 0.5) -> tuple[str, np.ndarray]:
    """Caption and clip number ``seed`` of a split (the same seed gives the same clip everywhere)."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, sample_attributes(rng, held_out=held_out, two_objects=two_objects))
    return scene.attributes.caption, render(scene)
