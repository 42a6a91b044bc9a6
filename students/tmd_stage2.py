"""TMD's stage 2: DMD2-v whose student sample is the rolled-out inner flow (paper, section 4.3 and Eq. 15).

The main backbone runs once on noised data and the flow head N times; the losses of :mod:`students.dmd2v` then reach all
N inner steps and the backbone.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from students.dmd2v import DMD2V, DMD2VConfig, alternation_cost
from students.errors import ConfigError
from students.method import Cost, MethodKind, Shape, draw_noise, interpolate, per_sample
from students.times import grid
from students.tmd import TMDStudent


@dataclass(frozen=True, kw_only=True)
class Stage2Config(DMD2VConfig):
    """Hyper-parameters of TMD's stage 2: those of DMD2-v, and how x_hat is made."""

    n: int = 2
    """N, inner steps, at least 1."""
    gamma_inner: float = 10.0
    """Shift of the inner grid, above 0; 1 is none."""
    rollout: bool = True
    """Train through all N inner steps; false (ablation): through one jump from s_N to 0, with N steps in sampling."""
    x_hat: Literal["ours", "printed"] = "ours"
    """For y = x1 - x: x_t - t y ("ours"), or x1 - y as the paper prints, whose variance is too large for 0 < t < 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        grid(self.n, self.gamma_inner)
        if self.x_hat not in ("ours", "printed"):
            raise ConfigError(f"The form {self.x_hat!r} of x_hat is unknown; choose ours or printed.")

    def inner_grid(self) -> Tensor:
        """The inner grid of a training step, float64."""
        return grid(self.n if self.rollout else 1, self.gamma_inner)


class TMDStage2(DMD2V):
    """TMD's stage 2: DMD2-v whose student sample is the rolled-out inner flow."""

    def __init__(
        self, student: TMDStudent, teacher: WanTransformer3DModel, negative: Tensor, config: Stage2Config
    ) -> None:
        """Set the method up; see DMD2V.

        Args:
            student: Network to train, from stage 1.
            teacher: Frozen base model.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Hyper-parameters.
        """

        def generate(x: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
            return rollout_sample(student, x, text, generator, config)

        super().__init__(student, generate, teacher, negative, config)


def rollout_sample(
    student: TMDStudent, x: Tensor, text: Tensor, generator: torch.Generator, config: Stage2Config
) -> Tensor:
    """x_hat from noised data x_t at a random t of t_1 .. t_M, with gradients through all inner steps (stage 2).

    Args:
        student: The student.
        x: Clean latents (B, C, T, H, W); no backward simulation of the outer loop.
        text: Prompt embeddings (B, text_length, D).
        generator: Source of every draw.
        config: Grids and the form of x_hat.
    """
    t = config.outer_times(len(x), generator).to(x.device)
    x1, y1 = draw_noise(x, generator), draw_noise(x, generator)
    x_t = interpolate(x, x1, t)
    y = student.rollout(student.backbone(x_t, t, text), y1, config.inner_grid(), x_t=x_t, t=t)
    if student.target == "x":
        return y
    return x1 - y if config.x_hat == "printed" else x_t - per_sample(t, y).to(y.dtype) * y


def stage2_cost(config: Stage2Config, iteration: int, shape: Shape) -> Cost:
    """Expected cost of an iteration for one pair: x_hat takes the backbone and N heads, L + (N - 1) H blocks."""
    assert shape.h is not None
    run = shape.blocks + ((config.n if config.rollout else 1) - 1) * shape.h
    return alternation_cost(config, iteration, shape.blocks, Cost(run, run))


def stage2_sampling(config: Stage2Config) -> dict[str, Any]:
    """How the student is sampled, for ``student.json``."""
    return {
        "m": config.m, "n": config.n, "sampler": "tmd", "gamma_outer": config.sampling_gamma,
        "gamma_inner": config.gamma_inner,
    }  # fmt: skip


STAGE2_KIND = MethodKind(
    label="tmd",
    config=Stage2Config,
    build=TMDStage2,
    sampling=stage2_sampling,
    cost=stage2_cost,
    flow_head=True,
)
