"""Times: the shift, the grids of M outer and N inner steps, and the random times of the losses.

All of it is float64; t = 0 is data, t = 1 is noise. A time enters a network as 1000 t, and only there is it rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from students.errors import ConfigError

LOW, HIGH = 0.001, 0.999
"""Range of random times; HIGH is also the noisiest grid point, since Wan was not trained at t = 1."""


def rational_shift(t: Tensor, gamma: float) -> Tensor:
    """gamma t / ((gamma - 1) t + 1): moves times towards noise for gamma > 1, towards data below; 0 and 1 stay.

    Args:
        t: times in [0, 1], any shape.
        gamma: strength, above 0; 1 is the identity.

    Raises:
        ConfigError: gamma is not above 0.
    """
    if not gamma > 0:
        raise ConfigError(f"The time shift gamma is {gamma}; it must be above 0 (1 means no shift).")
    return gamma * t / ((gamma - 1) * t + 1)


def grid(steps: int, gamma: float, maximum: float = HIGH) -> Tensor:
    """The time grid 0 = t_0 < ... < t_steps with t_i = min(shift(i / steps), maximum).

    Args:
        steps: number of steps (M for the outer grid, N for the inner one), at least 1.
        gamma: strength of the rational shift, above 0.
        maximum: largest time, in (0, 1].

    Returns:
        float64 tensor (steps + 1,), strictly increasing.

    Raises:
        ConfigError: steps below 1, gamma not above 0, or a shift so strong that two points meet at ``maximum``.
    """
    if steps < 1:
        raise ConfigError(f"A time grid needs at least 1 step, not {steps}.")
    points = rational_shift(torch.arange(steps + 1, dtype=torch.float64) / steps, gamma).clamp(max=maximum)
    check_grid(points)
    return points


def check_grid(points: Tensor | Sequence[float]) -> None:
    """Refuse a grid that is not 0 = t_0 < t_1 < ... <= 1 with at least one step.

    Raises:
        ConfigError: with the grid, and what is wrong with it.
    """
    values = [float(point) for point in points]
    shown = "[" + ", ".join(f"{value:g}" for value in values) + "]"
    if len(values) < 2:
        raise ConfigError(f"The time grid {shown} has no step; give at least two points, the first of them 0.")
    if values[0] != 0:
        raise ConfigError(f"The time grid {shown} starts at {values[0]:g}; it must start at 0 (data).")
    if not all(a < b for a, b in pairwise(values)):
        raise ConfigError(f"The time grid {shown} is not strictly increasing; order it from 0 (data) to noise.")
    if values[-1] > 1:
        raise ConfigError(f"The time grid {shown} ends at {values[-1]:g}; times lie in [0, 1].")


def read_times(text: str) -> tuple[float, ...]:
    """Times as ``--times`` takes them, "0.999,0.5", the noisiest first in whatever order they come.

    Raises:
        ConfigError: it is no list of numbers.
    """
    try:
        return tuple(sorted(map(float, text.split(",")), reverse=True))
    except ValueError as error:
        raise ConfigError(f"--times {text}: write numbers with commas, such as 0.999,0.937,0.833,0.624.") from error


def grid_of(times: Sequence[float]) -> Tensor:
    """The grid 0 = t_0 < ... < t_M of times t_M > ... > t_1, float64 (M + 1,); :func:`check_grid` judges it."""
    return torch.tensor([0.0, *reversed(times)], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How uniform random times are moved, as a rule towards noise."""

    kind: Literal["rational", "gaussian"] = "rational"
    """"rational": gamma t / ((gamma - 1) t + 1); "gaussian": t + alpha with alpha ~ N(0, sigma^2), clamped."""
    gamma: float = 1.0
    """Strength of the rational shift, above 0; below 1 it moves towards data."""
    sigma: float = 0.1
    """Standard deviation of the Gaussian shift, at least 0."""

    def __post_init__(self) -> None:
        if self.kind not in ("rational", "gaussian"):
            raise ConfigError(f"The time shift {self.kind!r} is unknown; choose rational or gaussian.")
        if not self.gamma > 0:
            raise ConfigError(f"The time shift gamma is {self.gamma}; it must be above 0 (1 means no shift).")
        if not self.sigma >= 0:
            raise ConfigError(f"The sigma of the Gaussian time shift is {self.sigma}; it must be at least 0.")

    def apply(self, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Shifted times, same shape; ``generator`` draws the Gaussian kind's noise."""
        if self.kind == "rational":
            return rational_shift(t, self.gamma)
        alpha = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
        return (t + self.sigma * alpha).clamp(LOW, HIGH)


def sample_times(n: int, shift: Shift, generator: torch.Generator, low: float = LOW, high: float = HIGH) -> Tensor:
    """n random times: uniform in [low, high], shifted, and clamped to [low, high] again.

    Args:
        n: how many.
        shift: the shift of the method (gamma 5 for t_dmd, 3 for s_mf in the paper).
        generator: source of randomness; its device is where the times are made.
        low: smallest time, above 0 where a method divides by the time.
        high: largest time, at most 1.

    Returns:
        float64 tensor (n,).
    """
    uniform = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
    return shift.apply(low + (high - low) * uniform, generator).clamp(low, high)
