"""Samplers: Algorithm 1 of the paper for TMD students, diffusers' scheduler for teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from students.base import Base, guided, velocity
from students.errors import ConfigError
from students.times import check_grid
from students.tmd import TMDStudent


class VideoNoise:
    """Standard normal noise with one random stream per video, so that a video depends on its own seed only.

    Args:
        seeds: one per video, each in [0, 2^63).
        latent_shape: (C, T, H, W).
    """

    def __init__(self, seeds: Sequence[int], latent_shape: tuple[int, int, int, int]) -> None:
        self.latent_shape = latent_shape
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:
        """The next noise of every video, (B, C, T, H, W), float32 on the CPU; the first is x1, the others y1."""
        return torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in self.generators])


@torch.inference_mode()
def sample_tmd(
    student: TMDStudent,
    text: Tensor,
    noise: Tensor,
    outer_grid: Tensor,
    inner_grid: Tensor,
    inner_noise: Callable[[], Tensor],
) -> Tensor:
    """Algorithm 1: x <- noise; for i = M..1: m = m(x, t_i), x <- x - (t_i - t_{i-1}) InnerFlow(m), with fresh y1 each.

    For the target y = x the transition direction is the one towards that clean estimate, (x - InnerFlow) / t_i.

    Args:
        student: in evaluation mode.
        text: caption embeddings (B, text_length, D).
        noise: x1, (B, C, T, H, W).
        outer_grid: 0 = t_0 < ... < t_M, float64.
        inner_grid: 0 = s_0 < ... < s_N, float64.
        inner_noise: gives y1, shaped as ``noise``, at each outer step.

    Returns:
        Normalised latents (B, C, T, H, W).

    Raises:
        ConfigError: a grid is not strictly increasing from 0.
    """
    check_grid(outer_grid)
    check_grid(inner_grid)
    points = outer_grid.tolist()
    x = noise
    for i in range(len(points) - 1, 0, -1):
        t = torch.full((len(x),), points[i], dtype=torch.float64, device=x.device)
        m = student.backbone(x, t, text)
        y = student.rollout(m, inner_noise().to(x), inner_grid, x_t=x, t=t)
        direction = y if student.target == "x1-x" else (x - y) / points[i]
        x = x - (points[i] - points[i - 1]) * direction
    return x


@torch.inference_mode()
def sample_teacher(
    base: Base, text: Tensor, negative: Tensor | None, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """The teacher's own sampler: the loop of ``WanPipeline`` with the scheduler of the pipeline folder.

    Args:
        base: the teacher.
        text: caption embeddings (B, text_length, D).
        negative: embeddings of the negative prompt, (1 or B, text_length, D); None for guidance 1 or below.
        noise: (B, C, T, H, W).
        steps: number of steps, at least 1.
        guidance: w in v_u + w (v_c - v_u); at 1 or below there is no guidance and one forward pass a step.

    Returns:
        Normalised latents (B, C, T, H, W), float32.

    Raises:
        ConfigError: steps below 1, or guidance without negative embeddings.
    """
    if steps < 1:
        raise ConfigError(f"The teacher needs at least 1 step, not {steps}.")
    if guidance > 1 and negative is None:
        raise ConfigError(f"Guidance {guidance} needs the negative prompt's embedding.")
    scheduler = type(base.scheduler).from_config(base.scheduler.config)  # schedulers keep state between steps
    scheduler.set_timesteps(steps, device=noise.device)
    scheduler.set_begin_index(0)
    x = noise.float()
    for timestep in scheduler.timesteps:
        t = (timestep.double() / scheduler.config.num_train_timesteps).expand(len(x))
        v = velocity(base.transformer, x, t, text)
        if guidance > 1 and negative is not None:
            v = guided(v, velocity(base.transformer, x, t, negative.expand(len(x), -1, -1)), guidance)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x
