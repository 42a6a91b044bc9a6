"""The plain few-step student: a whole Wan transformer, and the steps that take it from one time to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from students.base import clean, velocity


def round_time(t: Tensor) -> Tensor:
    """Times as a network in bf16 sees them: 1000 t rounded to 8 significant bits (rCM's release rounds so).

    Args:
        t: times in [0, 1], float64; derivatives pass as if nothing had been rounded.
    """
    return t + ((1000 * t).bfloat16().double() / 1000 - t).detach()


def plain_estimate(student: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, *, bf16_times: bool = False) -> Tensor:
    """g(x_t, t) = x_t - t v(x_t, t), the student's clean sample.

    Args:
        student: Wan transformer.
        x_t: noisy latents (B, C, T, H, W).
        t: times (B,) in [0, 1], float64.
        text: prompt embeddings (B, text_length, D).
        bf16_times: the network sees the time through :func:`round_time`.
    """
    v = velocity(student, x_t, round_time(t) if bf16_times else t, text)
    return clean(x_t, t, v)


def straight(x_t: Tensor, g: Tensor, t: float, t_next: float, fresh: Callable[[], Tensor]) -> Tensor:
    """Eq. 18: (1 - t_next / t) g + (t_next / t) x_t, which stays on the straight path through x_t and g.

    Args:
        x_t: latents at t, (B, C, T, H, W).
        g: clean estimate, same shape.
        t: time above 0.
        t_next: time in [0, t].
        fresh: not used.
    """
    return (1 - t_next / t) * g + (t_next / t) * x_t


def renoise(x_t: Tensor, g: Tensor, t: float, t_next: float, fresh: Callable[[], Tensor]) -> Tensor:
    """Eq. 19: (1 - t_next) g + t_next eps, with fresh noise at every step; at t_next = 0 none is drawn.

    Args:
        x_t: not used.
        g: clean estimate (B, C, T, H, W).
        t: not used.
        t_next: time in [0, 1].
        fresh: gives eps, shaped as g.
    """
    return (1 - t_next) * g + t_next * fresh().to(g) if t_next > 0 else g


NEXT_POINT = {"ode": straight, "sde": renoise}
"""Name of a plain sampler to the step it takes."""


def walk(
    student: nn.Module,
    x: Tensor,
    text: Tensor,
    points: Sequence[float],
    sampler: str,
    fresh: Callable[[], Tensor],
    *,
    bf16_times: bool = False,
) -> Tensor:
    """The latents at points[0], reached from x at points[-1] by the student's own steps.

    Args:
        student: Wan transformer.
        x: latents (B, C, T, H, W); their precision is that of the walk.
        text: prompt embeddings (B, text_length, D).
        points: increasing times in [0, 1]; a single one returns x.
        sampler: a name of NEXT_POINT.
        fresh: gives standard normal noise shaped as x.
        bf16_times: see :func:`plain_estimate`.
    """
    for j in range(len(points) - 1, 0, -1):
        t = torch.full((len(x),), points[j], dtype=torch.float64, device=x.device)
        g = plain_estimate(student, x, t, text, bf16_times=bf16_times)
        x = NEXT_POINT[sampler](x, g, points[j], points[j - 1], fresh)
    return x
