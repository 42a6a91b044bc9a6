"""A student of your own, from beginning to end: discrete consistency distillation (Song et al., arXiv 2303.01469).

The student's clean estimate g(x_t, t) should be the same everywhere on a trajectory of the teacher. So it is compared
at two neighbouring times of a fine grid, the nearer one reached by one Euler step of the guided teacher. Run it with

    tmd-eval train examples/micro_discrete_consistency.yaml
    python -m students.contract examples/micro_discrete_consistency.yaml

docs/your-own-student.md walks through this file.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from students.base import guided, velocity
from students.errors import ConfigError
from students.method import Batch, Cost, MethodKind, Shape, draw_noise, interpolate, per_sample
from students.plain import plain_estimate
from students.times import grid


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings, read strictly from the section ``method`` of the YAML file."""

    m: int = 2
    """M, steps the student is sampled with."""
    gamma_outer: float = 10.0
    """Shift of its sampling grid, above 0; 1 is none."""
    steps: int = 32
    """Points of the fine grid that neighbours are taken from, at least 2."""
    gamma_fine: float = 5.0
    """Shift of the fine grid, above 0; 1 is none."""
    guidance: float = 5.0
    """Guidance scale w of the teacher; 1 means none."""

    def __post_init__(self) -> None:
        grid(self.m, self.gamma_outer)  # refuses what makes no grid
        grid(self.steps, self.gamma_fine)
        if self.steps < 2:
            raise ConfigError(f"method.steps is {self.steps}; neighbours need at least 2 points.")


def pseudo_huber(difference: Tensor) -> Tensor:
    """sqrt(||d||^2 + c^2) - c with c = 0.00054 sqrt(dimension), mean over samples (arXiv 2310.14189).

    Args:
        difference: (B, C, T, H, W).
    """
    flat = difference.double().flatten(1)
    c = 0.00054 * flat.shape[1] ** 0.5
    return ((flat.square().sum(dim=1) + c**2).sqrt() - c).mean()


class DiscreteConsistency:
    """The method: what moves, and by which losses."""

    def __init__(
        self, student: nn.Module, teacher: WanTransformer3DModel, negative: Tensor, config: ConsistencyConfig
    ) -> None:
        """Keep the networks; there is none beside the student.

        Args:
            student: Copy of the teacher to train.
            teacher: Frozen base model.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Settings.
        """
        self.student, self.teacher, self.negative, self.config = student, teacher, negative, config
        self.networks: dict[str, nn.Module] = {"student": student}
        self._distance = torch.zeros(())

    def turn(self, iteration: int) -> tuple[str, ...]:
        """The student moves at every iteration."""
        return ("student",)

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The one term, "consistency"; every draw comes from the generator."""
        config, x, text = self.config, batch.latents, batch.text
        fine = grid(config.steps, config.gamma_fine)
        index = torch.randint(1, config.steps + 1, (len(x),), generator=generator)
        t, nearer = fine[index].to(x.device), fine[index - 1].to(x.device)
        x_t = interpolate(x, draw_noise(x, generator), t)
        with torch.no_grad():
            v = velocity(self.teacher, x_t, t, text)
            if config.guidance != 1:
                v = guided(v, velocity(self.teacher, x_t, t, self.negative.to(text).expand_as(text)), config.guidance)
            x_nearer = (x_t - per_sample(t - nearer, x) * v).to(x.dtype)
            target = plain_estimate(self.student, x_nearer, nearer, text)
        difference = plain_estimate(self.student, x_t, t, text) - target
        self._distance = difference.detach().abs().mean()
        return {"consistency": pseudo_huber(difference)}

    def metrics(self) -> dict[str, float]:
        """Mean distance of the two estimates, logged beside the loss."""
        return {"distance": float(self._distance)}


def cost(config: ConsistencyConfig, iteration: int, shape: Shape) -> Cost:
    """Blocks run for one pair: the teacher, guided, the target, and the student there and back."""
    teacher = shape.blocks * (1 if config.guidance == 1 else 2)
    return Cost(teacher + 2 * shape.blocks, shape.blocks)


def sampling(config: ConsistencyConfig) -> dict[str, Any]:
    """How the student is sampled: re-noised between its M steps, as consistency models are."""
    return {"m": config.m, "sampler": "sde", "gamma_outer": config.gamma_outer}


KIND = MethodKind(
    label="consistency",
    config=ConsistencyConfig,
    build=DiscreteConsistency,
    sampling=sampling,
    cost=cost,
)
