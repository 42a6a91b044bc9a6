"""Times: shifts, grids and random times against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from students.errors import ConfigError
from students.times import Shift, check_grid, grid, rational_shift, read_times, sample_times


def test_grid_of_the_paper_by_hand() -> None:
    # shift 10 at M = 2: t' = 1/2 gives 10 * 0.5 / (9 * 0.5 + 1) = 5 / 5.5
    assert grid(2, 10).tolist() == pytest.approx([0, 5 / 5.5, 0.999], abs=1e-15)
    assert grid(1, 10).tolist() == [0, 0.999]
    assert grid(4, 5).tolist() == pytest.approx([0, 0.625, 5 / 6, 0.9375, 0.999], abs=1e-15)
    assert grid(4, 1).tolist() == [0, 0.25, 0.5, 0.75, 0.999]
    assert grid(2, 10).dtype == torch.float64


@given(steps=st.integers(1, 50), gamma=st.floats(0.05, 15))
@settings(deadline=None)
def test_grids_increase_from_zero(steps: int, gamma: float) -> None:
    points = grid(steps, gamma)
    check_grid(points)
    assert len(points) == steps + 1 and points[0] == 0 and points[-1] == 0.999


@given(gamma=st.floats(0.01, 100), t=st.floats(0, 1))
def test_shift_inverts_with_the_reciprocal(gamma: float, t: float) -> None:
    shifted = rational_shift(torch.tensor(t, dtype=torch.float64), gamma).item()
    low, high = (t, 1) if gamma >= 1 else (0, t)  # towards noise from 1 on, towards data below
    assert low - 1e-15 <= shifted <= high + 1e-15
    assert shifted / (gamma - (gamma - 1) * shifted) == pytest.approx(t, abs=1e-9)  # the inverse, by hand


@pytest.mark.parametrize(
    "points, what",
    [
        ([0, 0.5, 0.5, 0.9], "strictly increasing"),
        ([0, 0.7, 0.3], "strictly increasing"),
        ([0.1, 0.5], "start at 0"),
        ([0, 1.5], "ends at 1.5"),
        ([0], "no step"),
        ([0, math.nan], "strictly increasing"),
    ],
)
def test_bad_grids_are_refused(points: list[float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_grid(torch.tensor(points, dtype=torch.float64))


def test_bad_steps_and_shifts_are_refused() -> None:
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=str(steps)):
            grid(steps, 10)
    for gamma in (0, -0.5, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            grid(2, gamma)
    with pytest.raises(ConfigError, match="strictly increasing"):
        grid(4, 1000)  # t_3 would be past 0.999 already
    with pytest.raises(ConfigError, match="linear"):
        Shift(kind="linear")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sigma"):
        Shift(kind="gaussian", sigma=-1)


def test_times_of_a_command_line() -> None:
    assert read_times("0.5,0.999, 0.7") == (0.999, 0.7, 0.5)
    for wrong in ("", "0.5,", "0.5 0.7", "half"):
        with pytest.raises(ConfigError, match="write numbers with commas"):
            read_times(wrong)


def test_random_times_follow_the_shifted_law() -> None:
    n = 40_000
    times = sample_times(n, Shift(gamma=5), torch.Generator().manual_seed(0))
    assert times.dtype == torch.float64 and times.min() >= 0.001 and times.max() <= 0.999
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = [5 * q / (4 * q + 1) for q in (0.001 + 0.998 * p for p in quantiles.tolist())]
    assert torch.quantile(times, quantiles).tolist() == pytest.approx(expected, abs=0.01)


def test_gaussian_shift_adds_noise_and_clamps() -> None:
    generator = torch.Generator().manual_seed(0)
    middle = Shift(kind="gaussian", sigma=0.05).apply(torch.full((20_000,), 0.5, dtype=torch.float64), generator)
    assert middle.mean().item() == pytest.approx(0.5, abs=0.002) and middle.std().item() == pytest.approx(
        0.05, rel=0.03
    )
    edge = Shift(kind="gaussian", sigma=0.5).apply(torch.full((1000,), 0.99, dtype=torch.float64), generator)
    assert edge.min() >= 0.001 and edge.max() == 0.999


def test_random_times_repeat_with_the_seed() -> None:
    draws = [sample_times(8, Shift(gamma=3), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
