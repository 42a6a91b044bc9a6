"""Samplers: Algorithm 1 of the paper for TMD students, Eq. 18 and 19 for plain ones, diffusers' scheduler for teachers.

Every sampler takes a ``clock``: a function from the name of a part ("backbone" or "head") to a context open while
that part computes. ``tmd-eval latency`` passes one that measures; :func:`untimed` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from students.base import Base, guided, velocity
from students.errors import ConfigError
from students.plain import NEXT_POINT, round_time
from students.text_kv import text_once
from students.times import check_grid
from students.tmd import TMDStudent

Clock = Callable[[str], AbstractContextManager[None]]


def untimed(part: str) -> AbstractContextManager[None]:
    """The clock that does not measure."""
    return nullcontext()


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
    clock: Clock = untimed,
) -> Tensor:
    """Algorithm 1: x <- noise; for i = M..1: m = m(x, t_i), x <- x - (t_i - t_{i-1}) InnerFlow(m), with fresh y1 each.

    For the target y = x the transition direction is the one towards that clean estimate, (x - InnerFlow) / t_i. Rotary
    embeddings and the keys and values of the text are computed once per outer step, not per inner step.

    Args:
        student: in evaluation mode.
        text: caption embeddings (B, text_length, D).
        noise: x1, (B, C, T, H, W).
        outer_grid: 0 = t_0 < ... < t_M, float64.
        inner_grid: 0 = s_0 < ... < s_N, float64.
        inner_noise: gives y1, shaped as ``noise``, at each outer step.
        clock: told of "backbone" and "head".

    Returns:
        Normalised latents (B, C, T, H, W).

    Raises:
        ConfigError: a grid is not strictly increasing from 0.
    """
    check_grid(outer_grid)
    check_grid(inner_grid)
    points = outer_grid.tolist()
    x = noise
    with text_once(student.head_blocks):
        for i in range(len(points) - 1, 0, -1):
            t = torch.full((len(x),), points[i], dtype=torch.float64, device=x.device)
            with clock("backbone"):
                m = student.backbone(x, t, text)
            y1 = inner_noise().to(x)
            with clock("head"):
                y = student.rollout(m, y1, inner_grid, x_t=x, t=t)
            direction = y if student.target == "x1-x" else (x - y) / points[i]
            x = x - (points[i] - points[i - 1]) * direction
    return x


@torch.inference_mode()
def sample_plain(
    transformer: WanTransformer3DModel,
    text: Tensor,
    noise: Tensor,
    outer_grid: Tensor,
    sampler: str = "ode",
    fresh_noise: Callable[[], Tensor] | None = None,
    *,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    scaled: bool = False,
    bf16_times: bool = False,
    clock: Clock = untimed,
) -> Tensor:
    """A plain student: at each t_i the clean estimate g = x - t_i v, and from it the next, less noisy sample.

    The steps are those of :mod:`students.plain`: "ode" is Eq. 18, deterministic; "sde" Eq. 19, with fresh noise, as
    DMD2 and rCM have it. The last g is the result.

    Args:
        transformer: in evaluation mode.
        text: caption embeddings (B, text_length, D).
        noise: x1, (B, C, T, H, W).
        outer_grid: 0 = t_0 < ... < t_M, float64.
        sampler: "ode" or "sde".
        fresh_noise: gives eps, shaped as ``noise``; needed for "sde".
        negative: embeddings of the negative prompt, (1 or B, text_length, D), needed with guidance.
        guidance: w in v_u + w (v_c - v_u); at 1 there is no guidance and one forward pass a step.
        scaled: start from t_M x1 instead of x1.
        bf16_times: round 1000 t to bfloat16, as rCM's code does.
        clock: told of "backbone".

    Returns:
        Normalised latents (B, C, T, H, W), float32.

    Raises:
        ConfigError: the grid is not strictly increasing from 0, guidance without negative embeddings, or "sde" without
            fresh noise.
    """
    check_grid(outer_grid)
    if guidance > 1 and negative is None:
        raise ConfigError(f"Guidance {guidance} needs the negative prompt's embedding.")
    if sampler == "sde" and fresh_noise is None:
        raise ConfigError("The sampler sde re-noises at every step; give fresh_noise.")
    fresh = fresh_noise or (lambda: noise)  # Eq. 18 draws none
    points = outer_grid.tolist()
    x = noise.float() * (points[-1] if scaled else 1.0)
    for i in range(len(points) - 1, 0, -1):
        t = torch.full((len(x),), points[i], dtype=torch.float64, device=x.device)
        t = round_time(t) if bf16_times else t
        with clock("backbone"):
            v = velocity(transformer, x, t, text)
            if guidance > 1 and negative is not None:
                v = guided(v, velocity(transformer, x, t, negative.expand(len(x), -1, -1)), guidance)
        x = NEXT_POINT[sampler](x, x - points[i] * v, points[i], points[i - 1], fresh)
    return x


@torch.inference_mode()
def sample_teacher(
    base: Base,
    text: Tensor,
    negative: Tensor | None,
    noise: Tensor,
    steps: int,
    guidance: float,
    clock: Clock = untimed,
    watch: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """The teacher's own sampler: the loop of ``WanPipeline`` with the scheduler of the pipeline folder.

    Args:
        base: the teacher.
        text: caption embeddings (B, text_length, D).
        negative: embeddings of the negative prompt, (1 or B, text_length, D); None for guidance 1 or below.
        noise: (B, C, T, H, W).
        steps: number of steps, at least 1.
        guidance: w in v_u + w (v_c - v_u); at 1 or below there is no guidance and one forward pass a step.
        clock: told of "backbone".
        watch: told of every point before its step: the step from 0, the time in [0, 1], and x.

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
    for step, timestep in enumerate(scheduler.timesteps):
        t = (timestep.double() / scheduler.config.num_train_timesteps).expand(len(x))
        if watch is not None:
            watch(step, float(t[0]), x)
        with clock("backbone"):
            v = velocity(base.transformer, x, t, text)
            if guidance > 1 and negative is not None:
                v = guided(v, velocity(base.transformer, x, t, negative.expand(len(x), -1, -1)), guidance)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x
