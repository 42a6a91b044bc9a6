"""Stage 2, DMD2-v: distribution matching (VSD), fake score and GAN, with the flow head rolled out for TMD.

Three networks: the student; the fake score, a copy of the teacher that follows the student's distribution; the
discriminator on the frozen teacher's features. The student moves every 5th iteration, the other two in between.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from students.base import clean, features, guided, velocity
from students.discriminator import SCALES, Conv3DDiscriminator, default_feature_blocks
from students.errors import ConfigError
from students.method import Batch, draw_noise, gate_metric, interpolate, per_sample
from students.times import Shift, grid, sample_times
from students.tmd import TMDStudent

NORM_FLOOR = 1e-6
Generate = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(clean latents, text, generator) -> x_hat, the student's clean sample, with gradients."""


def vsd_gradient(x_hat: Tensor, g_fake: Tensor, g_teacher: Tensor, norm: Literal["x_hat", "printed"]) -> Tensor:
    """Direction of variational score distillation, (g_fake - g_teacher) / norm, detached, at least float32.

    Args:
        x_hat: Student samples (B, C, T, H, W).
        g_fake: Clean estimates of the noised samples by the fake score, same shape.
        g_teacher: Those by the teacher, with guidance.
        norm: Per-sample mean of |x_hat - g_teacher| ("x_hat", as DMD2, FastGen and rCM) or of |g_fake - g_teacher|
            ("printed", as the TMD paper prints); both at least 1e-6.
    """
    precision = torch.promote_types(x_hat.dtype, torch.float32)
    x_hat, g_fake, g_teacher = (part.detach().to(precision) for part in (x_hat, g_fake, g_teacher))
    difference = g_fake - g_teacher
    scale = x_hat - g_teacher if norm == "x_hat" else difference
    return difference / scale.abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=NORM_FLOOR)


def vsd_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Half the mean squared distance to stopgrad(x_hat - gradient); its gradient in x_hat is gradient / numel.

    Args:
        x_hat: Student samples (B, C, T, H, W).
        gradient: From vsd_gradient, same shape.
    """
    x_hat = x_hat.to(gradient.dtype)
    return 0.5 * functional.mse_loss(x_hat, (x_hat - gradient).detach())


def fake_score_loss(v: Tensor, x_hat: Tensor, noise: Tensor) -> Tensor:
    """Unweighted velocity regression, mean |v - (noise - x_hat)|^2; nothing flows into the student.

    Args:
        v: The fake score's velocity at (1 - t) x_hat + t noise, (B, C, T, H, W).
        x_hat: Student samples.
        noise: Standard normal noise.
    """
    return functional.mse_loss(v, (noise - x_hat).detach())


def generator_gan_loss(fake: Tensor) -> Tensor:
    """Non-saturating loss of the student, mean over samples and heads of -log sigmoid(D(fake)).

    Args:
        fake: Logits (B, heads).
    """
    return functional.softplus(-fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Negative minimax log-likelihood, mean of -log(1 - sigmoid(D(fake))) plus mean of -log sigmoid(D(real)).

    Args:
        fake: Logits of noised student samples, (B, heads).
        real: Logits of noised data, (B, heads).
    """
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def approximate_r1(real: Tensor, perturbed: Tensor) -> Tensor:
    """Finite-difference stand-in for the R1 penalty, mean |D(real) - D(real + small noise)|^2 (as in FastGen).

    Args:
        real: Logits of noised data, (B, heads).
        perturbed: Logits of the same data, slightly perturbed before noising.
    """
    return functional.mse_loss(perturbed, real)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep parameters out of the graphs built inside, so that gradients pass through but not into the network.

    Args:
        network: Any module.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class DMD2VConfig:
    """Hyper-parameters of DMD2-v for any student; the defaults are the paper's and, where it is silent, FastGen's."""

    m: int = 2
    """M, outer steps of the student's grid, at least 1."""
    gamma_outer: float = 10.0
    """Shift of the outer grid, at least 1."""
    student_every: int = 5
    """The student moves when this divides the iteration, fake score and discriminator otherwise; at least 2."""
    guidance: float = 5.0
    """Guidance scale w of the teacher in VSD; 1 means none."""
    norm: Literal["x_hat", "printed"] = "x_hat"
    """Norm of the VSD gradient: mean |x_hat - g_teacher|, or mean |g_fake - g_teacher| as the paper prints."""
    shift_dmd: Literal["rational", "gaussian"] = "rational"
    """Kind of shift of t_dmd, the noise level in all losses."""
    gamma_dmd: float = 5.0
    """Strength of the rational shift of t_dmd, at least 1."""
    sigma_dmd: float = 0.1
    """Standard deviation of the Gaussian shift of t_dmd."""
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
        grid(self.m, self.gamma_outer)
        self.t_dmd()
        if self.student_every < 2:
            raise ConfigError(f"student_every is {self.student_every}; from 2 on the fake score gets to move too.")
        for name in ("gan_weight", "r1_weight", "r1_sigma"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.norm not in ("x_hat", "printed"):
            raise ConfigError(f"The norm {self.norm!r} of the VSD gradient is unknown; choose x_hat or printed.")

    def t_dmd(self) -> Shift:
        """The shift of the noise level in the losses."""
        return Shift(kind=self.shift_dmd, gamma=self.gamma_dmd, sigma=self.sigma_dmd)


@dataclass(frozen=True, kw_only=True)
class Stage2Config(DMD2VConfig):
    """Hyper-parameters of TMD's stage 2: those of DMD2-v, and how x_hat is made."""

    n: int = 2
    """N, inner steps, at least 1."""
    gamma_inner: float = 10.0
    """Shift of the inner grid, at least 1."""
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
        if config.gan_weight:
            shape = teacher.config
            width = shape.num_attention_heads * shape.attention_head_dim
            self.blocks = config.feature_blocks or default_feature_blocks(len(teacher.blocks))
            self.discriminator = Conv3DDiscriminator(
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
        if config.gan_weight:
            # One forward pass of the teacher serves both: its velocity for VSD, its features, with graph, for the GAN.
            v_teacher, seen = features(self.teacher, x_t, t, text, self.blocks)
        with torch.no_grad():
            if not config.gan_weight:
                v_teacher = velocity(self.teacher, x_t, t, text)
            if config.guidance != 1:
                bare = velocity(self.teacher, x_t, t, self.negative.to(text).expand_as(text))
                v_teacher = guided(v_teacher, bare, config.guidance)
            v_fake = velocity(self.fake_score, x_t, t, text)
            gradient = vsd_gradient(x_hat, clean(x_t, t, v_fake), clean(x_t, t, v_teacher), config.norm)
        terms = {"vsd": vsd_loss(x_hat, gradient)}
        self._figures = {"vsd_gradient": gradient.abs().mean()}
        if config.gan_weight:
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
        if config.gan_weight:
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
    index = torch.randint(1, config.m + 1, (len(x),), generator=generator, device=generator.device).cpu()
    t = grid(config.m, config.gamma_outer)[index].to(x.device)
    x1, y1 = draw_noise(x, generator), draw_noise(x, generator)
    x_t = interpolate(x, x1, t)
    y = student.rollout(student.backbone(x_t, t, text), y1, config.inner_grid(), x_t=x_t, t=t)
    if student.target == "x":
        return y
    return x1 - y if config.x_hat == "printed" else x_t - per_sample(t, y).to(y.dtype) * y
