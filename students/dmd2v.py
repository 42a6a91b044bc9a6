"""DMD2-v: distribution matching (VSD), fake score and GAN, for any student; and the plain few-step student.

Three networks: the student; the fake score, a copy of the teacher that follows the student's distribution; the
discriminator on the frozen teacher's features. The student moves every 5th iteration, the other two in between. The
baseline's student is a whole Wan transformer; TMD's flow head joins in :mod:`students.tmd_stage2`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from students.base import clean, features, guided, velocity
from students.discriminator import DISCRIMINATORS, SCALES, default_feature_blocks, make_discriminator
from students.errors import ConfigError
from students.losses import (
    approximate_r1,
    discriminator_loss,
    fake_score_loss,
    frozen,
    generator_gan_loss,
    vsd_gradient,
    vsd_loss,
)
from students.method import Batch, Cost, MethodKind, Shape, draw_noise, gate_metric, interpolate
from students.parallel import together
from students.plain import NEXT_POINT, plain_estimate, walk
from students.times import HIGH, LOW, Shift, grid, sample_times

Generate = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(clean latents, text, generator) -> x_hat, the student's clean sample, with gradients."""


@dataclass(frozen=True, kw_only=True)
class DMD2VConfig:
    """Hyper-parameters of DMD2-v for any student; the defaults are the paper's and, where it is silent, FastGen's."""

    m: int = 2
    """M, outer steps of the student's grid, at least 1."""
    gamma_outer: float = 10.0
    """Shift of the outer grid, above 0; 1 is none."""
    student_every: int = 5
    """The student moves when this divides the iteration, fake score and discriminator otherwise; at least 2."""
    guidance: float = 5.0
    """Guidance scale w of the teacher in VSD; 1 means none."""
    norm: Literal["x_hat", "printed"] = "x_hat"
    """Norm of the VSD gradient: mean |x_hat - g_teacher|, or mean |g_fake - g_teacher| as the paper prints."""
    shift_dmd: Literal["rational", "gaussian"] = "rational"
    """Kind of shift of t_dmd, the noise level in all losses."""
    gamma_dmd: float = 5.0
    """Strength of the rational shift of t_dmd, above 0; 1 is none."""
    sigma_dmd: float = 0.1
    """Standard deviation of the Gaussian shift of t_dmd."""
    shift_outer: Literal["rational", "gaussian"] = "rational"
    """Kind of shift of the student's times. "gaussian": the grid is i / M, cut at 0.999, and training moves each point
    by N(0, sigma_outer^2), within [0.001, 0.999]."""
    sigma_outer: float = 0.1
    """Standard deviation of the Gaussian shift of the student's times."""
    discriminator: Literal["conv3d", "conv1d2d", "attention", "none"] = "conv3d"
    """Kind of the heads; "none": no GAN at all."""
    gan_weight: float = 0.03
    """Weight of the student's GAN loss beside VSD; 0 leaves the discriminator out."""
    feature_blocks: tuple[int, ...] | None = None
    """Teacher blocks (from 0) whose outputs the discriminator sees; null: default_feature_blocks."""
    discriminator_width: int | None = None
    """Channels inside the discriminator; null: default_width."""
    discriminator_scales: tuple[int, ...] = SCALES
    """Pooling factors of the discriminator's branches; those above the latents' sides repeat the largest useful one."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty in the discriminator's loss; 0: off."""
    r1_sigma: float = 0.1
    """Standard deviation of its perturbation of the latents."""

    def __post_init__(self) -> None:
        self.outer_grid()
        self.t_dmd()
        if self.discriminator not in DISCRIMINATORS:
            raise ConfigError(
                f"The discriminator {self.discriminator!r} is unknown; choose one of {', '.join(DISCRIMINATORS)}."
            )
        if self.discriminator_width is not None and self.discriminator_width < 1:
            raise ConfigError(f"discriminator_width is {self.discriminator_width}; it must be at least 1, or null.")
        if not self.discriminator_scales or min(self.discriminator_scales) < 1:
            raise ConfigError(f"discriminator_scales are {self.discriminator_scales}; name whole numbers from 1 on.")
        if self.student_every < 2:
            raise ConfigError(f"student_every is {self.student_every}; from 2 on the fake score gets to move too.")
        for name in ("gan_weight", "r1_weight", "r1_sigma", "sigma_outer"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.r1_weight and not self.adversarial:
            raise ConfigError(f"r1_weight is {self.r1_weight}, but there is no discriminator to penalise; set it to 0.")
        if self.norm not in ("x_hat", "printed"):
            raise ConfigError(f"The norm {self.norm!r} of the VSD gradient is unknown; choose x_hat or printed.")

    def t_dmd(self) -> Shift:
        """The shift of the noise level in the losses."""
        return Shift(kind=self.shift_dmd, gamma=self.gamma_dmd, sigma=self.sigma_dmd)

    @property
    def adversarial(self) -> bool:
        """True if there is a discriminator."""
        return self.discriminator != "none" and self.gan_weight > 0

    @property
    def sampling_gamma(self) -> float:
        """Shift of the grid that the student is sampled on."""
        return self.gamma_outer if self.shift_outer == "rational" else 1.0

    def outer_grid(self) -> Tensor:
        """The student's grid 0 = t_0 < ... < t_M, float64."""
        return grid(self.m, self.sampling_gamma)

    def outer_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times of t_1 .. t_M, each equally likely, float64 (count,) on the CPU.

        Args:
            count: How many.
            generator: Source of the draws.
        """
        index = torch.randint(1, self.m + 1, (count,), generator=generator, device=generator.device).cpu()
        t = self.outer_grid()[index]
        if self.shift_outer == "rational":
            return t
        alpha = torch.randn(count, generator=generator, dtype=torch.float64, device=generator.device).cpu()
        return (t + self.sigma_outer * alpha).clamp(LOW, HIGH)


@dataclass(frozen=True, kw_only=True)
class PlainDMD2VConfig(DMD2VConfig):
    """Hyper-parameters of the baseline: those of DMD2-v, and how its plain student samples."""

    sampler: Literal["ode", "sde"] = "ode"
    """From one point of the grid to the next: "ode", along the straight path (Eq. 18), or "sde", re-noised (Eq. 19)."""
    backward_simulation: bool = False
    """Train on the student's own samples at t_i, reached from noise by its sampler (as the original DMD2), instead of
    noised data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in NEXT_POINT:
            raise ConfigError(f"The sampler {self.sampler!r} is unknown; choose one of {', '.join(NEXT_POINT)}.")
        if self.backward_simulation and self.shift_outer == "gaussian":
            raise ConfigError(
                "backward_simulation stands on the points of the sampling grid, which shift_outer gaussian would move; "
                "choose one of the two."
            )


class DMD2V:
    """DMD2-v as a Method, for any student that can make a clean sample."""

    def __init__(
        self,
        student: nn.Module,
        generate: Generate,
        teacher: WanTransformer3DModel,
        negative: Tensor,
        config: DMD2VConfig,
    ) -> None:
        """Copy the teacher into the fake score and build the discriminator from torch's global random state.

        Args:
            student: Network to train.
            generate: Makes x_hat from a batch with it.
            teacher: Frozen base model.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Hyper-parameters.
        """
        self.student, self.generate, self.teacher = student, generate, teacher
        self.negative, self.config = negative, config
        self.fake_score = copy.deepcopy(teacher).requires_grad_(True)
        self.networks: dict[str, nn.Module] = {"student": student, "fake_score": self.fake_score}
        if config.adversarial:
            shape = teacher.config
            width = shape.num_attention_heads * shape.attention_head_dim
            self.blocks = config.feature_blocks or default_feature_blocks(len(teacher.blocks))
            self.discriminator = make_discriminator(
                config.discriminator,
                width // math.prod(shape.patch_size),
                len(self.blocks),
                config.discriminator_width,
                config.discriminator_scales,
            )
            self.networks["discriminator"] = self.discriminator
        self._figures: dict[str, Tensor] = {}

    def turn(self, iteration: int) -> tuple[str, ...]:
        """Name the networks that move: the student at every student_every-th iteration, else the others together."""
        if iteration % self.config.student_every == 0:
            return ("student",)
        return tuple(name for name in self.networks if name != "student")

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute "vsd" and "gan", or "fake_score", "discriminator" and "r1", as far as they are in use."""
        if self.turn(iteration) == ("student",):
            return self._student_losses(batch, generator)
        return self._critic_losses(batch, generator)

    def metrics(self) -> dict[str, float]:
        """Size of the VSD gradient, mean logits of the latest step, and the fusion gate."""
        return {key: float(value) for key, value in self._figures.items()} | gate_metric(self.student)

    def _student_losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        config, text = self.config, batch.text
        x_hat = self.generate(batch.latents, text, generator)
        t, noise = self._noise_level(batch.latents, generator)
        x_t = interpolate(x_hat, noise, t)
        seen: list[Tensor] = []
        if config.adversarial:
            # One forward pass of the teacher serves both: its velocity for VSD, its features, with graph, for the GAN.
            v_teacher, seen = features(self.teacher, x_t, t, text, self.blocks)
        with torch.no_grad():
            if not config.adversarial:
                v_teacher = velocity(self.teacher, x_t, t, text)
            if config.guidance != 1:
                bare = velocity(self.teacher, x_t, t, self.negative.to(text).expand_as(text))
                v_teacher = guided(v_teacher, bare, config.guidance)
            v_fake = velocity(self.fake_score, x_t, t, text)
            gradient = vsd_gradient(x_hat, clean(x_t, t, v_fake), clean(x_t, t, v_teacher), config.norm)
        terms = {"vsd": vsd_loss(x_hat, gradient)}
        self._figures = {"vsd_gradient": gradient.abs().mean()}
        if config.adversarial:
            with frozen(self.discriminator):
                logits = self.discriminator(seen)
            terms["gan"] = config.gan_weight * generator_gan_loss(logits)
            self._figures["logit_generated"] = logits.detach().mean()
        return terms

    def _critic_losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        config, text = self.config, batch.text
        with torch.no_grad():
            x_hat = self.generate(batch.latents, text, generator)
            t, noise = self._noise_level(batch.latents, generator)
            x_t = interpolate(x_hat, noise, t)
        terms = {"fake_score": fake_score_loss(velocity(self.fake_score, x_t, t, text), x_hat, noise)}
        self._figures = {}
        if config.adversarial:
            fake = self._judge(x_t, t, text)
            real = self._judge(interpolate(batch.latents, noise, t), t, text)  # same t and noise as the fake
            terms["discriminator"] = discriminator_loss(fake, real)
            self._figures = {"logit_fake": fake.detach().mean(), "logit_real": real.detach().mean()}
            if config.r1_weight:
                near = batch.latents + config.r1_sigma * draw_noise(batch.latents, generator)
                perturbed = self._judge(interpolate(near, noise, t), t, text)
                terms["r1"] = config.r1_weight * approximate_r1(real, perturbed)
        return terms

    def _noise_level(self, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = sample_times(len(like), self.config.t_dmd(), generator).to(like.device)
        return t, draw_noise(like, generator)

    def _judge(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            _, seen = features(self.teacher, x_t, t, text, self.blocks)
        return self.discriminator(seen)


def plain_sample(
    student: nn.Module, x: Tensor, text: Tensor, generator: torch.Generator, config: PlainDMD2VConfig
) -> Tensor:
    """x_hat = g(x_t, t) of the plain student at a random t of t_1 .. t_M, with gradients.

    Args:
        student: Wan transformer.
        x: Clean latents (B, C, T, H, W), noised to t; with backward simulation only their shape matters.
        text: Prompt embeddings (B, text_length, D).
        generator: Source of every draw.
        config: Grid and sampler.
    """
    if config.backward_simulation:
        # One t for all samples of a pass: each then costs no more steps than it needs.
        i = int(torch.randint(1, config.m + 1, (1,), generator=generator, device=generator.device))
        points = config.outer_grid()[i:].tolist()
        t = torch.full((len(x),), points[0], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            start = draw_noise(x, generator)
            x_t = walk(student, start, text, points, config.sampler, lambda: draw_noise(x, generator))
            for _ in range(i - 1 if together(student) else 0):  # as many passes on every rank; these are thrown away
                plain_estimate(student, start, t, text)
    else:
        t = config.outer_times(len(x), generator).to(x.device)
        x_t = interpolate(x, draw_noise(x, generator), t)
    return plain_estimate(student, x_t, t, text)


class PlainDMD2V(DMD2V):
    """The baseline DMD2-v: the losses above on a whole Wan transformer, no flow head."""

    def __init__(
        self, student: nn.Module, teacher: WanTransformer3DModel, negative: Tensor, config: PlainDMD2VConfig
    ) -> None:
        """Set the method up; see DMD2V.

        Args:
            student: Copy of the teacher to train, for M = 1 from the KD warm-up (:mod:`students.kd`).
            teacher: Frozen base model.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Hyper-parameters.
        """

        def generate(x: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
            return plain_sample(student, x, text, generator, config)

        super().__init__(student, generate, teacher, negative, config)


def alternation_cost(config: DMD2VConfig, iteration: int, blocks: int, sample: Cost) -> Cost:
    """What one iteration of the alternation costs for one pair.

    Args:
        config: Hyper-parameters.
        iteration: Counts from 1.
        blocks: L.
        sample: Cost of making x_hat with gradients.
    """
    if iteration % config.student_every == 0:
        guidance = blocks if config.guidance != 1 else 0
        seen = max(config.feature_blocks or default_feature_blocks(blocks)) + 1
        through = seen / 2 if config.adversarial else 0
        return sample.plus(Cost(2 * blocks + guidance, through))  # teacher and fake score; back through the teacher
    judged = (2 + (config.r1_weight > 0)) * blocks if config.adversarial else 0
    return Cost(sample.forwards + blocks + judged, blocks)


def plain_cost(config: PlainDMD2VConfig, iteration: int, shape: Shape) -> Cost:
    """Expected cost of an iteration for one pair; backward simulation adds (M - 1) / 2 passes on average."""
    simulated = (config.m - 1) / 2 if config.backward_simulation else 0
    sample = Cost(shape.blocks * (1 + simulated), shape.blocks)
    return alternation_cost(config, iteration, shape.blocks, sample)


def plain_sampling(config: PlainDMD2VConfig) -> dict[str, Any]:
    """How the baseline's student is sampled, for ``student.json``."""
    return {"m": config.m, "sampler": config.sampler, "gamma_outer": config.sampling_gamma}


DMD2V_KIND = MethodKind(
    label="dmd2-v",
    config=PlainDMD2VConfig,
    build=PlainDMD2V,
    sampling=plain_sampling,
    cost=plain_cost,
)
