"""The generator of the micro world: captions, splits, geometry, rendering."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from students.micro import world
from students.micro.world import (
    DIRECTIONS,
    FRAMES,
    RELATIONS,
    SHAPES,
    SIZE,
    SPEEDS,
    Scene,
    all_attributes,
    coverage,
    extent,
    is_held_out,
    make_clip,
    parse_caption,
    render,
    sample_attributes,
    sample_scene,
)


def scene_of(seed: int, held_out: bool = False) -> Scene:
    rng = np.random.default_rng(seed)
    return sample_scene(rng, sample_attributes(rng, held_out=held_out, two_objects=0.7))


def test_every_caption_parses_back_to_its_attributes_and_is_unique():
    attributes = all_attributes()
    assert len(attributes) == 768 + 30_720
    assert len({a.caption for a in attributes}) == len(attributes)
    assert all(parse_caption(a.caption) == a for a in attributes[::37])


@pytest.mark.parametrize("text", ["", "a red circle", "a red circle moves left slowly on a dark background."])
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="not a caption of the micro world; write for example"):
        parse_caption(text)


def test_splits_are_disjoint_and_hold_an_eighth():
    held = [is_held_out(a.caption) for a in all_attributes()]
    assert 0.11 < np.mean(held) < 0.14
    rng = np.random.default_rng(0)
    for held_out in (True, False):
        assert all(is_held_out(sample_attributes(rng, held_out=held_out).caption) == held_out for _ in range(50))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_objects_stay_inside_apart_and_move_as_the_caption_says(seed):
    scene = scene_of(seed)
    a = scene.attributes
    places = [np.add(scene.start, np.multiply(scene.travel, f)) for f in np.linspace(0, 1, FRAMES)]
    reach = extent(a.shape, scene.radii[0])
    for place in places:
        assert (place - reach >= 0).all() and (place + reach <= SIZE).all()
    along = np.dot(scene.travel, DIRECTIONS[a.direction])
    low, high = SPEEDS[a.speed]
    assert low - 1e-9 <= along <= high + 1e-9
    if scene.still:
        assert a.relation and a.color2 != a.color
        side = np.array(RELATIONS[a.relation])
        gap = min(float(np.dot(np.subtract(p, scene.still), side)) for p in places)
        assert gap >= reach + extent(a.shape2 or "", scene.radii[1]) + 1 - 1e-9


def test_fast_objects_cross_about_two_of_their_widths_and_the_speeds_do_not_meet():
    scenes = [scene_of(seed) for seed in range(400)]
    widths = [
        np.hypot(*s.travel) / (2 * extent(s.attributes.shape, s.radii[0]))
        for s in scenes
        if s.attributes.speed == "quickly"
    ]
    assert np.mean(widths) > 1.7 and max(widths) > 2.5
    assert SPEEDS["slowly"][1] + 5 < SPEEDS["quickly"][0]


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_anti_aliased_and_has_the_shapes_area(shape):
    """Area by the renderer against area by counting points of a fine grid."""
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    cover = coverage(shape, 5.0, x - 16.3, y - 15.8)
    fine = (np.arange(SIZE * 16) + 0.5) / 16
    fy, fx = np.meshgrid(fine, fine, indexing="ij")
    inside = {
        "circle": np.hypot(fx - 16.3, fy - 15.8) < 5,
        "square": np.maximum(abs(fx - 16.3), abs(fy - 15.8)) < 4.43,
        "triangle": (fy - 15.8 < 5.25) & (fy - 15.8 > np.sqrt(3) * abs(fx - 16.3) - 5.25),
        "cross": (np.minimum(abs(fx - 16.3), abs(fy - 15.8)) < 2.1)
        & (np.maximum(abs(fx - 16.3), abs(fy - 15.8)) < 5.75),
    }[shape]
    assert cover.sum() == pytest.approx(inside.sum() / 256, rel=0.03)
    assert ((cover > 0.05) & (cover < 0.95)).sum() > 8


def test_rendering_shows_the_objects_where_the_scene_puts_them():
    scene = replace(scene_of(3), tint=(1.0, 1.0, 1.0))
    clip = render(scene)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.float32
    assert clip.min() >= 0 and clip.max() <= 1
    for frame, fraction in ((0, 0.0), (FRAMES - 1, 1.0)):
        x, y = np.add(scene.start, np.multiply(scene.travel, fraction))
        assert clip[frame, int(y), int(x)] == pytest.approx(scene.colors[0], abs=1e-6)


def test_clips_depend_on_the_seed_only():
    first, again, other = (
        make_clip((1, 2), held_out=True),
        make_clip((1, 2), held_out=True),
        make_clip((1, 3), held_out=True),
    )
    assert first[0] == again[0] and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_the_world_has_not_changed_under_the_shipped_weights():
    """The teacher was trained on exactly these clips; a change of the renderer needs new weights."""
    weight = np.arange(FRAMES * SIZE * SIZE * 3).reshape(FRAMES, SIZE, SIZE, 3) % 7
    figures = [(make_clip((7, i), held_out=bool(i % 2))[1] * weight).mean() for i in range(8)]
    assert figures == pytest.approx([1.4082, 1.9333, 2.1027, 1.3072, 1.4111, 0.4776, 1.5895, 2.4864], abs=2e-4)
    assert world.FPS == 4
