"""Steps of the inner flow on a flow whose average velocity is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.inner_flow import distances, euler
from students.times import grid
from students.tmd import Features, TMDStudent

SHAPE = (2, 3, 4, 4)


class Exponential(nn.Module):
    """dy/ds = y, whose flow is y_r = exp(r - s) y_s and whose average velocity y (1 - exp(r - s)) / (s - r)."""

    target = "x1-x"
    rollout = TMDStudent.rollout

    def __init__(self, taught: bool) -> None:
        super().__init__()
        self.taught = taught

    def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Features:
        return Features(text, (t, t), text)

    def average_velocity(self, y: Tensor, s: Tensor, r: Tensor, features: Features, **_: Any) -> Tensor:
        gap = (s - r).view(-1, 1, 1, 1, 1)
        exact = torch.where(gap > 0, (1 - (-gap).exp()) / gap.clamp(min=1e-12), torch.ones_like(gap))
        return ((exact if self.taught else 1.0) * y).to(y.dtype)


def found(taught: bool, n: int = 2) -> dict[str, Any]:
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    return distances(Exponential(taught), x, torch.zeros(32, 1, 1), m=2, inner=grid(n, 1.0), gamma=10.0)  # type: ignore[arg-type]


def test_average_velocities_end_where_the_flow_ends_and_euler_steps_do_not():
    y1 = torch.ones(1, *SHAPE, dtype=torch.float64)
    times, student = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), Exponential(True)
    features = student.backbone(y1, times[:1], y1)
    ends = [
        student.rollout(features, y1, times).mean().item(),  # type: ignore[misc]
        euler(student, features, y1, times).mean().item(),  # type: ignore[arg-type]
    ]
    assert ends == pytest.approx([math.exp(-1), 0.25])


def test_distances_tell_a_taught_map_from_an_untaught_one():
    taught, untaught = found(True), found(False)
    assert taught["average"]["value"] < 0.01 < taught["euler"]["value"]  # 60 Euler steps are the flow but for a little
    assert untaught["average"]["value"] == pytest.approx(untaught["euler"]["value"]) == taught["euler"]["value"]
    for entry in (*taught.values(), *untaught.values()):
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert found(False, n=8)["euler"]["value"] < 0.5 * untaught["euler"]["value"]
