"""TrigFlow around a rectified-flow network (sCM, arXiv 2410.11081; as rCM wraps Wan): x_t = cos t x + sin t eps.

Times t lie in [0, pi/2], 0 = data; tau in [0, 1] is the network's own time. With sigma = tan t = tau / (1 - tau) both
describe one noise level, and x_t / (cos t + sin t) is the rectified-flow sample at tau. Everything outside the network
is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from students.base import velocity
from students.method import per_sample
from students.plain import round_time


def rectified_time(t: Tensor) -> Tensor:
    """tau = sin t / (sin t + cos t).

    Args:
        t: TrigFlow times in [0, pi/2], float64.
    """
    return t.sin() / (t.sin() + t.cos())


def trig_time(tau: Tensor) -> Tensor:
    """t = atan(tau / (1 - tau)), pi/2 at tau = 1.

    Args:
        tau: Rectified-flow times in [0, 1], float64.
    """
    return torch.atan2(tau, 1 - tau)


class Coefficients(NamedTuple):
    """The wrapper of a rectified-flow network: x0_hat = c_skip x_t + c_out v(c_in x_t, c_noise)."""

    c_in: Tensor
    """Scale of the network's input."""
    c_noise: Tensor
    """The network's time, 1000 tau."""
    c_skip: Tensor
    """Share of x_t in the clean estimate."""
    c_out: Tensor
    """Share of the network's output in it."""


def coefficients(t: Tensor) -> Coefficients:
    """Coefficients at some times, shaped as they are.

    Args:
        t: TrigFlow times, float64.
    """
    total = t.cos() + t.sin()
    return Coefficients(1 / total, 1000 * t.sin() / total, 1 / total, -t.sin() / total)


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t x + sin t eps, float64.

    Args:
        x: Clean latents (B, C, T, H, W).
        noise: Standard normal noise, same shape.
        t: TrigFlow times (B,).
    """
    return per_sample(t.cos(), x) * x.double() + per_sample(t.sin(), x) * noise.double()


def trig_velocity(
    network: WanTransformer3DModel, x_t: Tensor, t: Tensor, text: Tensor, *, bf16_times: bool = False
) -> Tensor:
    """F(x_t, t), the network's estimate of dx_t/dt = cos t eps - sin t x, float64.

    F = (cos t x_t - x0_hat) / sin t, which is ((cos t - sin t) x_t + v) / (cos t + sin t): finite at t = 0 too.

    Args:
        network: A rectified-flow transformer.
        x_t: TrigFlow samples (B, C, T, H, W), float64.
        t: TrigFlow times (B,), float64.
        text: Prompt embeddings (B, text_length, D).
        bf16_times: The network sees 1000 tau in bf16, as in rCM's release.
    """
    total = per_sample(t.cos() + t.sin(), x_t)
    tau = rectified_time(t)
    # velocity() keeps the precision of its input, and the network's own precision is at most float32.
    v = velocity(network, x_t / total, round_time(tau) if bf16_times else tau, text)
    return (per_sample(t.cos() - t.sin(), x_t) * x_t + v) / total


def consistency(x_t: Tensor, flow: Tensor, t: Tensor) -> Tensor:
    """f = cos t x_t - sin t F: the clean estimate, and the consistency function.

    Args:
        x_t: TrigFlow samples (B, C, T, H, W), float64.
        flow: F(x_t, t), same shape.
        t: TrigFlow times (B,).
    """
    return per_sample(t.cos(), x_t) * x_t - per_sample(t.sin(), x_t) * flow
