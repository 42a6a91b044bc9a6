"""Stage 1, transition-matching MeanFlow (TM-MF): the flow head learns the average velocity of the inner flow.

Inner path y_s = (1 - s) y + s y1 from y = x1 - x (or y = x) to fresh noise y1, conditioned on m(x_t, t, c). The loss
asks u(y_s, s, r; m) = v - (s - r) du/ds along dy/ds = v, dr/ds = 0 (MeanFlow's identity on the inner flow).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from students.errors import ConfigError
from students.method import Batch, Cost, MethodKind, Shape, draw_noise, gate_metric, interpolate, per_sample
from students.parallel import together
from students.times import HIGH, LOW, Shift, grid, sample_times
from students.tmd import Features, TMDStudent

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(y_s, s) -> u(y_s, s, r; m) for a fixed r, m and y1."""


@dataclass(frozen=True, kw_only=True)
class TMMFConfig:
    """Hyper-parameters of stage 1; the defaults are the paper's for Wan2.1 1.3B (Table 7)."""

    m: int = 2
    """M, outer steps of the student's grid, at least 1."""
    n: int = 2
    """N, inner steps of the grid that r is taken from, at least 1."""
    gamma_outer: float = 10.0
    """Shift of the outer grid, above 0; 1 is none."""
    gamma_inner: float = 10.0
    """Shift of the inner grid, above 0; 1 is none."""
    gamma_s: float = 3.0
    """Shift of the inner time s, above 0; 1 is none."""
    matching_share: float = 0.75
    """Share of the samples with r = s, which is plain transition matching, in [0, 1]. At 1 the embedding of s - r stays
    zero, so that u(y_s, s, r) = u(y_s, s, s)."""
    guidance: float = 3.0
    """Guidance scale w distilled into the student; 1 means none."""
    dropout: float = 0.1
    """Probability of replacing the text by the negative prompt; such samples stay unguided."""
    derivative: Literal["finite", "exact"] = "finite"
    """du/ds by finite differences, or by forward-mode AD (plain attention only: too much memory at full size)."""
    delta: float = 0.005
    """Half width of the finite difference in s."""
    c_factor: float = 1.0
    """c of the adaptive weight over d, the number of values of one latent: 1 for 1.3B, 1e-5 for 14B."""

    def __post_init__(self) -> None:
        grid(self.m, self.gamma_outer)
        grid(self.n, self.gamma_inner)
        Shift(gamma=self.gamma_s)
        for name in ("matching_share", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"TM-MF's {name} is {getattr(self, name)}; it is a share and lies in [0, 1].")
        for name in ("delta", "c_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"TM-MF's {name} is {getattr(self, name)}; it must be above 0.")
        if self.derivative not in ("finite", "exact"):
            raise ConfigError(f"TM-MF's derivative {self.derivative!r} is unknown; choose finite or exact.")


class Draw(NamedTuple):
    """The random part of one TM-MF step; times are float64 on the generator's device."""

    x1: Tensor
    """Outer noise, shaped as the latents."""
    y1: Tensor
    """Inner noise, shaped as the latents."""
    t: Tensor
    """Outer times, each a point t_1 .. t_M of the student's grid, (B,)."""
    s: Tensor
    """Inner times, (B,)."""
    r: Tensor
    """Inner times that u reaches down to: s, or the largest inner grid point at or below s, (B,)."""
    dropped: Tensor
    """Samples whose text gives way to the negative prompt, bool, (B,)."""


def draw(x: Tensor, generator: torch.Generator, config: TMMFConfig) -> Draw:
    """Draw noises and times of one step (stage 1, points 1 and 2).

    Args:
        x: Clean latents (B, C, T, H, W); only the shape, dtype and device matter.
        generator: Source of every draw.
        config: Grids, shift and shares.
    """
    batch, device = len(x), generator.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device, dtype=torch.float64)

    x1, y1 = draw_noise(x, generator), draw_noise(x, generator)
    outer, inner = (
        points.to(device) for points in (grid(config.m, config.gamma_outer), grid(config.n, config.gamma_inner))
    )
    t = outer[torch.randint(1, config.m + 1, (batch,), generator=generator, device=device)]
    s = sample_times(batch, Shift(gamma=config.gamma_s), generator)
    r = inner[torch.searchsorted(inner, s, right=True) - 1]
    # The remainder of share x batch is rounded at random, so that batches of any size have the right share on average.
    count = int(config.matching_share * batch + uniform(1).item())
    matching = torch.randperm(batch, generator=generator, device=device)[:count]
    r[matching] = s[matching]
    return Draw(x1, y1, t, s, r, uniform(batch) < config.dropout)


def finite_derivative(u: Velocity, y_s: Tensor, v: Tensor, s: Tensor, r: Tensor, delta: float) -> Tensor:
    """du/ds along y_s + (s' - s) v by a central difference over s +- delta (stage 1, point 4).

    The stencil is cut at the ends of the interval in which u is trained, [max(r, 0.001), 0.999], and so becomes
    one-sided there: below r the average velocity has no meaning, and u of the target y = x is infinite at s = 0.

    Args:
        u: Average velocity with r, features and y1 fixed.
        y_s: Inner samples (B, C, T, H, W).
        v: Velocity of the path, same shape.
        s: Inner times (B,), float64, above r.
        r: Inner times (B,), float64.
        delta: Half width of the stencil.
    """
    low = torch.maximum(s - delta, r.clamp(min=LOW))
    high = (s + delta).clamp(max=HIGH)

    def at(time: Tensor) -> Tensor:
        y = y_s.double() + per_sample(time - s, y_s) * v.double()
        return u(y.to(y_s.dtype), time).double()

    return (at(high) - at(low)) / per_sample(high - low, y_s)


def exact_derivative(u: Velocity, y_s: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """du/ds along the tangent (v, 1) of (y_s, s) by forward-mode AD: the reference of finite_derivative.

    Args:
        u: Average velocity with r, features and y1 fixed.
        y_s: Inner samples (B, C, T, H, W).
        v: Velocity of the path, same shape.
        s: Inner times (B,), float64.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        tangent = torch.func.jvp(u, (y_s, s), (v.to(y_s.dtype), torch.ones_like(s)))[1]
    return tangent.detach().double()


def adaptive_loss(u: Tensor, target: Tensor, c_factor: float) -> Tensor:
    """Mean over samples of e / stopgrad(e + c), e = ||u - target||^2, c = c_factor d (stage 1, point 5).

    Args:
        u: Prediction (B, C, T, H, W).
        target: Constant of the same shape.
        c_factor: c over d = C T H W.
    """
    error = (u.double() - target.detach().double()).square().flatten(1)
    total = error.sum(dim=1)
    return (total / (total.detach() + c_factor * error.shape[1])).mean()


class Points(NamedTuple):
    """Points of a batch on their inner paths, with the outer samples that condition them."""

    y_s: Tensor
    """Inner samples (B, C, T, H, W)."""
    s: Tensor
    """Inner times (B,), float64."""
    r: Tensor
    """Inner times that u reaches down to, (B,), float64."""
    y1: Tensor
    """Noise at the far end of the inner path, shaped as y_s."""
    x_t: Tensor
    """Outer samples, shaped as y_s."""
    t: Tensor
    """Outer times (B,), float64."""

    def rows(self, index: Tensor) -> "Points":
        """Keep some samples only."""
        return Points(*(part[index] for part in self))

    def velocity(self, student: TMDStudent, features: Features) -> Tensor:
        """u(y_s, s, r; m) of the student."""
        return student.average_velocity(self.y_s, self.s, self.r, features, y1=self.y1, x_t=self.x_t, t=self.t)


@torch.no_grad()
def guide(v: Tensor, student: TMDStudent, points: Points, negative: Tensor, w: float) -> Tensor:
    """Guided conditional velocity w v + (1 - w) u(y_s, s, s; m(x_t, negative)) (stage 1, point 3; MeanFlow, kappa = 0).

    Args:
        v: Conditional velocity y1 - y, (B, C, T, H, W), float64.
        student: Gives its own velocity without text, by one forward pass.
        points: Where.
        negative: Embedding of the negative prompt for each sample, (B, text_length, D).
        w: Guidance scale; 1 leaves v as it is and costs nothing.
    """
    if w == 1 or not len(v):
        return v
    bare = student.backbone(points.x_t, points.t, negative)
    return w * v + (1 - w) * points._replace(r=points.s).velocity(student, bare).double()


@torch.no_grad()
def slope(student: TMDStudent, points: Points, features: Features, v: Tensor, config: TMMFConfig) -> Tensor:
    """du/ds along v with r, m and y1 fixed, float64, as config.derivative says (stage 1, point 4).

    Args:
        student: The student.
        points: Where; s above r.
        features: The backbone's output for these samples.
        v: Velocity of the path there, (B, C, T, H, W).
        config: Kind of derivative and its delta.
    """
    device = v.device.type
    if config.derivative == "exact" and together(student):
        raise ConfigError(
            "TM-MF's derivative is exact, which sharding and context parallelism do not allow; use finite."
        )
    if torch.is_autocast_enabled(device):  # half a bf16 digit over delta would drown the derivative
        features = features._replace(tokens=features.tokens.float(), text=features.text.float())

    def u(y_s: Tensor, s: Tensor) -> Tensor:
        return points._replace(y_s=y_s, s=s).velocity(student, features)

    with torch.autocast(device, enabled=False):
        if config.derivative == "exact":
            return exact_derivative(u, points.y_s, v, points.s)
        return finite_derivative(u, points.y_s, v, points.s, points.r, config.delta)


def tm_mf_loss(
    student: TMDStudent, x: Tensor, text: Tensor, negative: Tensor, generator: torch.Generator, config: TMMFConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of stage 1: E ||u - u_hat||^2 / stopgrad(. + c) with u_hat = stopgrad(v - (s - r) du/ds).

    Args:
        student: The student; gradients reach its main backbone too.
        x: Clean latents (B, C, T, H, W).
        text: Prompt embeddings (B, text_length, D).
        negative: Embedding of the negative prompt, (1, text_length, D).
        generator: Source of every random draw.
        config: Hyper-parameters.

    Returns:
        The loss (float64 scalar), and detached figures: "tm_error" and "mf_error", the mean squared error over the
        samples with r = s and over those with r < s, each absent where there are none.
    """
    plan = draw(x, generator, config)
    t, s, r = (time.to(x.device) for time in (plan.t, plan.s, plan.r))
    # Chosen on the generator's device: on a CUDA machine too, the sizes below are known without waiting for the GPU.
    kept = (~plan.dropped).nonzero()[:, 0].to(x.device)
    moving = (plan.r < plan.s).nonzero()[:, 0].to(x.device)
    negative = negative.to(text).expand_as(text)
    given = torch.where(plan.dropped.to(x.device)[:, None, None], negative, text)

    x_t = interpolate(x, plan.x1, t)
    y = plan.x1 - x if student.target == "x1-x" else x
    points = Points(interpolate(y, plan.y1, s), s, r, plan.y1, x_t, t)
    features = student.backbone(x_t, t, given)
    u = points.velocity(student, features)

    v = plan.y1.double() - y.double()
    for rows in _in_step(kept, student):
        guided = guide(v[rows], student, points.rows(rows), negative[rows], config.guidance)
        v[kept] = guided[: len(kept)]
    target = v.clone()
    for rows in _in_step(moving, student):
        part = features._replace(tokens=features.tokens[rows], text=features.text[rows])
        change = slope(student, points.rows(rows), part, v[rows], config)[: len(moving)]
        target[moving] -= per_sample((s - r)[moving], x) * change

    error = (u.detach().double() - target).square().flatten(1).mean(dim=1)
    figures = {"tm_error": error[r == s], "mf_error": error[r < s]}
    return adaptive_loss(u, target, config.c_factor), {k: e.mean() for k, e in figures.items() if len(e)}


def _in_step(rows: Tensor, student: TMDStudent) -> list[Tensor]:
    """The rows of a branch, or nothing where it has none.

    Where each pass of the student is a collective call, a rank without rows runs the branch on row 0 all the same and
    drops the result: the other ranks would wait for it for ever.
    """
    if len(rows):
        return [rows]
    return [torch.zeros(1, dtype=torch.long, device=rows.device)] if together(student) else []


class TMMF:
    """Stage 1 as a Method: one network, which moves at every iteration."""

    def __init__(self, student: TMDStudent, negative: Tensor, config: TMMFConfig) -> None:
        """Set the method up.

        Args:
            student: Network to train.
            negative: Embedding of the negative prompt, (1, text_length, D).
            config: Hyper-parameters.
        """
        self.student, self.negative, self.config = student, negative, config
        self.networks: dict[str, nn.Module] = {"student": student}
        if config.matching_share == 1:  # r = s alone would teach the embedding of s - r nothing about s - r > 0
            student.interval_embedder.requires_grad_(False)
        self._figures: dict[str, Tensor] = {}

    def turn(self, iteration: int) -> tuple[str, ...]:
        """Name the networks that move: always the student."""
        return ("student",)

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the one term, "tm_mf"."""
        loss, self._figures = tm_mf_loss(self.student, batch.latents, batch.text, self.negative, generator, self.config)
        return {"tm_mf": loss}

    def metrics(self) -> dict[str, float]:
        """Errors of the latest step and the fusion gate."""
        return {key: float(value) for key, value in self._figures.items()} | gate_metric(self.student)


def tm_mf_cost(config: TMMFConfig, iteration: int, shape: Shape) -> Cost:
    """Expected cost of an iteration for one pair: the student, its guidance, and du/ds where r < s."""
    assert shape.h is not None
    guidance = (1 - config.dropout) * shape.blocks if config.guidance != 1 else 0
    derivative = (1 - config.matching_share) * 2 * shape.h  # two heads; or value and tangent of one
    return Cost(shape.blocks + guidance + derivative, shape.blocks)


def tm_mf_sampling(config: TMMFConfig) -> dict[str, Any]:
    """How the student is sampled, for ``student.json``."""
    return {
        "m": config.m, "n": config.n, "sampler": "tmd", "gamma_outer": config.gamma_outer,
        "gamma_inner": config.gamma_inner,
    }  # fmt: skip


TM_MF_KIND = MethodKind(
    label="tm_mf",
    config=TMMFConfig,
    build=lambda student, teacher, negative, config: TMMF(student, negative, config),
    sampling=tm_mf_sampling,
    cost=tm_mf_cost,
    differentiates=True,
    flow_head=True,
)
