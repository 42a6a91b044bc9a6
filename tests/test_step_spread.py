"""The spread of samples at each step, on estimates whose spread is known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step_spread import open_steps, spread
from students.base import load_base
from students.data import DataConfig, open_data


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_the_spread_of_stretched_clips_is_the_factor(factor: float):
    x = torch.randn(100, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) + 2
    center = x.mean(0)
    found = spread(lambda x_t, t, text: center + factor * (x_t - center), x, torch.zeros(100, 1, 1), 1e-6)
    assert found["value"] == pytest.approx(factor, rel=1e-4)
    assert found["low"] == pytest.approx(factor, rel=1e-3) == found["high"]  # each clip is off by the same factor


def test_a_wrong_mean_counts_and_clips_that_differ_widen_the_interval():
    x = torch.randn(100, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    shifted = spread(lambda x_t, t, text: x_t + 1, x, torch.zeros(100, 1, 1), 1e-6)
    assert shifted["value"] == pytest.approx(2**0.5, rel=0.05)
    some = spread(lambda x_t, t, text: x_t * (1 + (x_t[:, :1, :1, :1, :1] > 0)), x, torch.zeros(100, 1, 1), 1e-6)
    assert some["low"] < some["value"] - 0.02 and some["value"] + 0.02 < some["high"]


def test_the_undistilled_teacher_is_too_flat_at_its_first_step_and_less_so_at_its_last():
    name, step, times = open_steps("micro", 4)
    assert name == "micro undistilled" and times == sorted(times, reverse=True) and len(times) == 4
    batch = open_data(load_base("micro"), DataConfig(clips=64), first=lambda make: make()).draw(0, 1, 64, slice(None))
    first, last = (spread(step, batch.latents, batch.text, t) for t in (times[0], times[-1]))
    assert first["high"] < 0.8 and first["high"] < last["low"] and 0.9 < last["value"] < 1.02
