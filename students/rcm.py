"""rCM: a continuous-time consistency model with a reverse-divergence regulariser (arXiv 2510.08431), as released.

The student learns f(x_t, t), the end of the teacher's guided trajectory through x_t, from its own derivative along that
trajectory (sCM), which covers all modes but blurs; a distribution-matching term on samples of its own (as DMD2, no GAN)
sharpens them. A plain Wan transformer, read as TrigFlow (:mod:`students.trigflow`). Settings and order of the steps are
those of the released code; where it departs from the sCM paper, a setting says so.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from students.base import guided
from students.errors import ConfigError
from students.method import Batch, Cost, MethodKind, Shape, draw_noise, per_sample
from students.parallel import together
from students.times import Shift, rational_shift, sample_times
from students.trigflow import consistency, noised, rectified_time, trig_time, trig_velocity

RELEASED_TIMES = (1.5, 1.4, 1.0)
"""TrigFlow times of the sampler after the first one, atan(sigma_max)."""
TANGENT_FLOOR = 0.1
WEIGHT_FLOOR = 1e-5
Flow = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> F(x_t, t) of some network, with the text fixed."""


def sampling_grid(m: int, sigma_max: float) -> tuple[float, ...]:
    """0 and the M times of rCM's sampler: the first M of atan(sigma_max), 1.5, 1.4, 1.0, as rectified-flow times.

    Args:
        m: M, 1 to 4.
        sigma_max: Noise level of the first step, above tan(1.5) = 14.1.

    Raises:
        ConfigError: M or sigma_max is out of range.
    """
    if not 1 <= m <= len(RELEASED_TIMES) + 1:
        raise ConfigError(f"method.m is {m}; rCM's list of times has 1 to {len(RELEASED_TIMES) + 1} steps.")
    if not sigma_max > math.tan(RELEASED_TIMES[0]):
        raise ConfigError(f"method.sigma_max is {sigma_max}; it must be above tan(1.5) = 14.1, the second time.")
    times = torch.tensor([math.atan(sigma_max), *RELEASED_TIMES][:m], dtype=torch.float64)
    return (0.0, *reversed(rectified_time(times).tolist()))


def flow_derivative(
    flow: Flow, x_t: Tensor, t: Tensor, teacher: Tensor, kind: Literal["exact", "semi", "finite"], step: float
) -> Tensor:
    """t_F = cos t sin t dF/dt along the teacher's trajectory dx_t/dt = F_teacher.

    Args:
        flow: F of the student.
        x_t: TrigFlow samples (B, C, T, H, W), float64.
        t: TrigFlow times (B,), float64.
        teacher: F_teacher(x_t, t), same shape as x_t.
        kind: "exact": one forward-mode derivative along (cos sin F_teacher, cos sin), a factor that keeps the tangent
            small near both ends (sCM, section 5.1). "semi": forward mode in x, a backward difference in t. "finite": a
            backward difference along one teacher step. Both differences are (cos h F(t) - F(t - h)) / sin h, which is
            exact for F that turns with t.
        step: h of the differences, in TrigFlow time.
    """
    factor = t.cos() * t.sin()
    scale = per_sample(factor, x_t)
    if kind == "finite":
        before = math.cos(step) * x_t - math.sin(step) * teacher
        return scale * (math.cos(step) * flow(x_t, t) - flow(before, t - step)) / math.sin(step)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        tangents = (scale * teacher, factor if kind == "exact" else torch.zeros_like(factor))
        value, change = torch.func.jvp(flow, (x_t, t), tangents)[:2]
    if kind == "semi":
        change = change + scale * (math.cos(step) * value - flow(x_t, t - step)) / math.sin(step)
    return change.detach()


def tangent(
    flow: Tensor,
    teacher: Tensor,
    x_t: Tensor,
    change: Tensor,
    t: Tensor,
    r: float,
    warmup: Literal["released", "paper"] = "released",
) -> Tensor:
    """g of sCM, at r = 1 cos t df/dt: -cos^2 t (F - F_teacher) - cos t sin t (x_t + dF/dt).

    Args:
        flow: F of the student, (B, C, T, H, W), float64.
        teacher: F_teacher, same shape.
        x_t: TrigFlow samples.
        change: t_F from flow_derivative.
        t: TrigFlow times (B,).
        r: Share of the warm-up that is over, in [0, 1].
        warmup: "released": -cos t sqrt(1 - r^2 sin^2 t) (F - F_teacher) - r cos t sin t x_t - t_F, with the derivative
            from the start; "paper" (sCM): -cos^2 t (F - F_teacher) - r (cos t sin t x_t + t_F).
    """
    cos, sin = per_sample(t.cos(), x_t), per_sample(t.sin(), x_t)
    if warmup == "paper":
        return -(cos**2) * (flow - teacher) - r * (cos * sin * x_t + change)
    return -cos * (1 - r**2 * sin**2).sqrt() * (flow - teacher) - r * cos * sin * x_t - change


def normalised(g: Tensor) -> Tensor:
    """g / (||g|| + 0.1), the norm over a whole sample; samples that are not finite become zero.

    Args:
        g: Tangents (B, C, T, H, W), float64.
    """
    finite = g.isfinite().flatten(1).all(dim=1)
    g = torch.where(per_sample(finite, g).bool(), g, 0.0)
    return g / (per_sample(g.flatten(1).norm(dim=1), g) + TANGENT_FLOOR)


def summed(difference: Tensor) -> Tensor:
    """Squares summed over C, T, H, W and averaged over samples, float64."""
    return difference.double().square().flatten(1).sum(dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class RCMConfig:
    """Hyper-parameters of rCM; the defaults are those released for Wan2.1 1.3B."""

    m: int = 4
    """M, steps the student is sampled with unless told otherwise, 1 to 4; training does not depend on it."""
    sigma_max: float = 80.0
    """Noise level of the sampler's first step; 200 for 14B in training."""
    bf16_times: bool = False
    """The networks see 1000 tau rounded to bf16, in training and sampling, as in the release."""
    consistency: Literal["scm", "dcm"] = "scm"
    """Consistency in continuous time, or (the warm-up stage) over finite steps of 1 / discrete_steps."""
    consistency_weight: float = 100.0
    """Weight of the consistency loss; 0 leaves it out."""
    dmd_weight: float = 1.0
    """Weight of the distribution-matching loss; 0 leaves it and the fake score out."""
    guidance: float = 5.0
    """Guidance scale w of the teacher in all losses; 1 means none."""
    derivative: Literal["exact", "semi", "finite"] = "exact"
    """dF/dt by forward-mode AD (plain attention: much memory at full size, and not with sharding), in x only, or by
    differences."""
    step: float = 1e-4
    """h of the differences, in TrigFlow time."""
    tangent_warmup: int = 1000
    """Iterations, all of the student and without distribution matching, over which r grows from 0 to 1."""
    warmup_form: Literal["released", "paper"] = "released"
    """Whether r leaves the derivative term alone, as the released code, or scales it too, as the sCM paper."""
    sigma_mean: float = 0.7
    """Mean of log sigma of the consistency loss; 1.5 for 14B."""
    sigma_deviation: float = 1.6
    """Standard deviation of log sigma."""
    discrete_steps: int = 48
    """One over the length of a teacher step of dcm, before the shift; times themselves are drawn continuously."""
    discrete_skip: int = 1
    """Teacher steps from a point to its target (dcm)."""
    gamma_discrete: float = 5.0
    """Shift of dcm's grid, above 0; 1 is none."""
    student_every: int = 5
    """After the warm-up the student moves when this divides the iterations since, the fake score otherwise; 10 for
    14B."""
    gamma_dmd: float = 5.0
    """Shift of the noise level of distribution matching, above 0; 1 is none."""
    simulated_steps: int = 4
    """Backward simulation takes 1, 2, ... so many steps in turn, 1 to 4."""
    fixed_times: bool = False
    """Simulate on the sampler's times 1.5, 1.4, 1.0 instead of random falling ones."""

    def __post_init__(self) -> None:
        sampling_grid(self.m, self.sigma_max)
        rational_shift(torch.zeros(1), self.gamma_discrete)
        Shift(gamma=self.gamma_dmd)
        choices: dict[str, tuple[str, ...]] = {
            "consistency": ("scm", "dcm"),
            "derivative": ("exact", "semi", "finite"),
            "warmup_form": ("released", "paper"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"method.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        for name, low in (("consistency_weight", 0), ("dmd_weight", 0), ("tangent_warmup", 0), ("student_every", 2)):
            if not getattr(self, name) >= low:
                raise ConfigError(f"method.{name} is {getattr(self, name)}; it must be at least {low}.")
        for name in ("step", "sigma_deviation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name} is {getattr(self, name)}; it must be above 0.")
        if not self.consistency_weight + self.dmd_weight > 0:
            raise ConfigError("Both consistency_weight and dmd_weight are 0, so nothing is learned; raise one.")
        if self.consistency_weight == 0 and self.tangent_warmup:
            raise ConfigError("consistency_weight is 0, so there is nothing to warm up; set tangent_warmup to 0.")
        if not 1 <= self.discrete_skip <= self.discrete_steps:
            raise ConfigError(f"method.discrete_skip is {self.discrete_skip}; it goes from 1 to discrete_steps.")
        if not 1 <= self.simulated_steps <= len(RELEASED_TIMES) + 1:
            raise ConfigError(f"method.simulated_steps is {self.simulated_steps}; it goes from 1 to 4.")
        if self.bf16_times and self.consistency == "scm" and self.derivative != "exact":
            raise ConfigError("A difference in time cannot be seen through bf16 times; use derivative exact, or fp32.")

    def student_moves(self, iteration: int) -> bool:
        """True if the student moves at this iteration (from 1), False for the fake score."""
        past = iteration - self.tangent_warmup
        return self.dmd_weight == 0 or past <= 0 or past % self.student_every == 0

    def matches(self, iteration: int) -> bool:
        """True if distribution matching is on at this iteration."""
        return self.dmd_weight > 0 and iteration > self.tangent_warmup

    def simulation(self, iteration: int) -> int:
        """Steps of backward simulation at this iteration: 1, 2, ... simulated_steps in turn, for each network apart."""
        student = self.tangent_warmup + (iteration - self.tangent_warmup) // self.student_every
        count = student if self.student_moves(iteration) else iteration - student - 1
        return count % self.simulated_steps + 1


class RCM:
    """rCM as a Method: the student, and the fake score once distribution matching is in use."""

    def __init__(self, student: nn.Module, teacher: WanTransformer3DModel, negative: Tensor, config: RCMConfig) -> None:
        """Copy the teacher into the fake score.

        Args:
            student: Copy of the teacher to train, or the student of a dcm stage.
            teacher: Frozen base model.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Hyper-parameters.
        """
        self.student, self.teacher, self.negative, self.config = student, teacher, negative, config
        self.networks: dict[str, nn.Module] = {"student": student}
        if config.dmd_weight:
            self.networks["fake_score"] = copy.deepcopy(teacher).requires_grad_(True)
        self._figures: dict[str, Tensor] = {}

    def turn(self, iteration: int) -> tuple[str, ...]:
        """Name the network that moves: the student throughout the warm-up, then at every student_every-th iteration."""
        return ("student",) if self.config.student_moves(iteration) else ("fake_score",)

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute "scm" or "dcm", and "dmd"; or "fake_score"."""
        config, x, text = self.config, batch.latents, batch.text
        self._figures = {}
        if not config.student_moves(iteration):
            return {"fake_score": self._critic(x, text, iteration, generator)}
        terms: dict[str, Tensor] = {}
        if config.consistency_weight:
            loss = self._continuous if config.consistency == "scm" else self._discrete
            terms[config.consistency] = config.consistency_weight * loss(x, text, iteration, generator)
        if config.matches(iteration):
            terms["dmd"] = config.dmd_weight * self._matching(x, text, iteration, generator)
        return terms

    def metrics(self) -> dict[str, float]:
        """Norm of the tangent before it is normalised, and size of the distribution-matching gradient."""
        return {key: float(value) for key, value in self._figures.items()}

    def _flow(self, network: nn.Module, text: Tensor) -> Flow:
        return lambda x_t, t: trig_velocity(network, x_t, t, text, bf16_times=self.config.bf16_times)

    @torch.no_grad()
    def _guided(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        flow = self._flow(self.teacher, text)(x_t, t)
        if self.config.guidance == 1:
            return flow
        bare = self._flow(self.teacher, self.negative.to(text).expand_as(text))(x_t, t)
        return guided(flow, bare, self.config.guidance)

    def _continuous(self, x: Tensor, text: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """The sCM loss: F moves by the normalised tangent."""
        config = self.config
        log_sigma = torch.randn(len(x), generator=generator, device=generator.device, dtype=torch.float64)
        t = torch.atan((config.sigma_mean + config.sigma_deviation * log_sigma).exp()).to(x.device)
        x_t = noised(x, draw_noise(x, generator), t)
        teacher, student = self._guided(x_t, t, text), self._flow(self.student, text)
        if config.derivative != "finite" and together(self.student):
            raise ConfigError(
                f"rCM's derivative is {config.derivative}, whose forward mode neither sharding nor context parallelism "
                "allows; use finite."
            )
        # Outside autocast: bf16 rounding divided by h is noise, and the exact derivative deserves better too.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            change = flow_derivative(student, x_t, t, teacher, config.derivative, config.step)
        flow = student(x_t, t)
        r = min(1.0, iteration / config.tangent_warmup) if config.tangent_warmup else 1.0
        g = tangent(flow.detach(), teacher, x_t, change, t, r, config.warmup_form)
        self._figures["tangent"] = g.flatten(1).norm(dim=1).mean()
        return summed(flow - flow.detach() - normalised(g))

    def _discrete(self, x: Tensor, text: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """The dCM loss: f at a point agrees with f some teacher steps nearer to the data."""
        config = self.config
        u = torch.rand(len(x), generator=generator, device=generator.device, dtype=torch.float64)
        u = (u * (1 - config.discrete_skip / config.discrete_steps)).to(x.device)
        times = [
            trig_time(rational_shift((1 - u - k / config.discrete_steps).clamp(min=0), config.gamma_discrete))
            for k in range(config.discrete_skip + 1)
        ]
        x_t = noised(x, draw_noise(x, generator), times[0])
        student = self._flow(self.student, text)
        estimate = consistency(x_t, student(x_t, times[0]), times[0])
        with torch.no_grad():
            point = x_t
            for t, nearer in pairwise(times):
                point = point - per_sample(t - nearer, x) * self._guided(point, t, text)
            target = consistency(point, student(point, times[-1]), times[-1])
        return summed(estimate - target)

    def _matching(self, x: Tensor, text: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """The reverse-divergence regulariser: VSD in TrigFlow, without a GAN."""
        made = self._simulate(x, text, self.config.simulation(iteration), generator)
        with torch.no_grad():
            t, x_t = self._noise_again(made, generator)
            fake = consistency(x_t, self._flow(self.networks["fake_score"], text)(x_t, t), t)
            real = consistency(x_t, self._guided(x_t, t, text), t)
            weight = (made - real).abs().flatten(1).mean(dim=1).clamp(min=WEIGHT_FLOOR)
            gradient = (fake - real) / per_sample(weight, made)
        self._figures["dmd_gradient"] = gradient.abs().mean()
        return summed(made - (made - gradient).detach())

    def _critic(self, x: Tensor, text: Tensor, iteration: int, generator: torch.Generator) -> Tensor:
        """Regression of the fake score, (G - x0_fake)^2 / sin^2 t."""
        with torch.no_grad():
            made = self._simulate(x, text, self.config.simulation(iteration), generator)
            t, x_t = self._noise_again(made, generator)
        fake = consistency(x_t, self._flow(self.networks["fake_score"], text)(x_t, t), t)
        return summed((made - fake) / per_sample(t.sin(), made))

    def _noise_again(self, made: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = trig_time(sample_times(len(made), Shift(gamma=self.config.gamma_dmd), generator)).to(made.device)
        return t, noised(made, draw_noise(made, generator), t)

    def _simulate(self, like: Tensor, text: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """Samples of the student from pure noise in so many steps, with gradients through the last one only."""
        student = self._flow(self.student, text)
        t = torch.full((len(like),), math.pi / 2, dtype=torch.float64, device=like.device)
        x_t = draw_noise(like, generator).double()
        for i in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == steps - 1):
                made = consistency(x_t, student(x_t, t), t)
            if i == steps - 1:
                break
            if self.config.fixed_times:
                t = torch.full_like(t, RELEASED_TIMES[i])
            else:
                drawn = sample_times(len(like), Shift(gamma=self.config.gamma_dmd), generator)
                t = torch.minimum(trig_time(drawn).to(t.device), t)
            x_t = noised(made, draw_noise(like, generator), t)
        return made


def rcm_cost(config: RCMConfig, iteration: int, shape: Shape) -> Cost:
    """Cost of an iteration for one pair; a forward-mode derivative counts two forwards."""
    blocks, teacher = shape.blocks, shape.blocks * (1 if config.guidance == 1 else 2)
    if not config.student_moves(iteration):
        return Cost((config.simulation(iteration) + 1) * blocks, blocks)
    total = Cost()
    if config.consistency_weight and config.consistency == "scm":
        derivative = {"exact": 2, "semi": 3, "finite": 2}[config.derivative]
        total = Cost(teacher + (derivative + 1) * blocks, blocks)
    elif config.consistency_weight:
        total = Cost(config.discrete_skip * teacher + 2 * blocks, blocks)
    if config.matches(iteration):
        total = total.plus(Cost((config.simulation(iteration) + 1) * blocks + teacher, blocks))
    return total


def rcm_sampling(config: RCMConfig) -> dict[str, Any]:
    """How the student is sampled, for ``student.json``: re-noising steps on the released times."""
    return {
        "m": config.m, "sampler": "sde", "initial": "scaled", "gamma_outer": None,
        "outer_grid": sampling_grid(config.m, config.sigma_max),
        "time_precision": "bfloat16" if config.bf16_times else "float64",
    }  # fmt: skip


RCM_KIND = MethodKind(
    label="rcm", config=RCMConfig, build=RCM, sampling=rcm_sampling, cost=rcm_cost, differentiates=True
)
