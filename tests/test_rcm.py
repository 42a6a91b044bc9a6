"""rCM: the wrapper by its definitions, consistency on a Gaussian flow in closed form, derivatives, and who moves."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from students.errors import ConfigError
from students.method import Batch, Shape
from students.plain import round_time
from students.rcm import (
    RCM,
    RCMConfig,
    flow_derivative,
    normalised,
    rcm_cost,
    rcm_sampling,
    sampling_grid,
    tangent,
)
from students.sampling import sample_plain
from students.times import rational_shift
from students.trigflow import coefficients, consistency, noised, rectified_time, trig_time, trig_velocity
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_transformer

SHAPE = (CHANNELS, 2, 4, 4)
MEAN, DEVIATION = 0.7, 0.4
TEXT = torch.zeros(1, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


class Network(nn.Module):
    """Called like Wan's transformer, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = SimpleNamespace(weight=torch.zeros((), dtype=torch.float64))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        return (self.velocity(hidden_states, column(timestep / 1000)),)

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        raise NotImplementedError


class GaussianTeacher(Network):
    """Exact rectified-flow velocity for data N(MEAN, DEVIATION^2) per coordinate."""

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        gain = (1 - tau) * DEVIATION**2 / ((1 - tau) ** 2 * DEVIATION**2 + tau**2)
        clean = MEAN + gain * (x - (1 - tau) * MEAN)
        return (x - clean) / tau.clamp(min=1e-12)


class Curved(Network):
    """A smooth nonlinear velocity."""

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        return torch.sin(2 * x + 3 * tau) + x * tau**2 + 0.3 * x.roll(1, 1)


def deviation(t: Tensor) -> Tensor:
    return (t.cos() ** 2 * DEVIATION**2 + t.sin() ** 2).sqrt()


def end_of_trajectory(x_t: Tensor, t: Tensor) -> Tensor:
    """The data end of the Gaussian flow through x_t: its marginal deviation shrinks to that of the data."""
    return MEAN + (x_t - column(t.cos()) * MEAN) * DEVIATION / column(deviation(t))


def ideal_flow(x_t: Tensor, t: Tensor) -> Tensor:
    """F of the analytic consistency function, (cos t x_t - f) / sin t."""
    return (column(t.cos()) * x_t - end_of_trajectory(x_t, t)) / column(t.sin())


def teacher_flow(x_t: Tensor, t: Tensor) -> Tensor:
    return trig_velocity(GaussianTeacher(), x_t, t, TEXT)  # type: ignore[arg-type]


def some(count: int = 6) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0.05, 1.5, count, dtype=torch.float64)
    x = torch.randn(count, *SHAPE, generator=seeded(), dtype=torch.float64)
    return noised(MEAN + DEVIATION * x, torch.randn(x.shape, generator=seeded(1), dtype=torch.float64), t), t


# --- the wrapper


def test_times_turn_into_each_other() -> None:
    t = torch.linspace(0, math.pi / 2, 9, dtype=torch.float64)
    tau = rectified_time(t)
    torch.testing.assert_close(trig_time(tau), t)
    torch.testing.assert_close(t[:-1].tan(), (tau / (1 - tau))[:-1])  # one sigma for both
    assert tau[0] == 0 and tau[-1] == 1


def test_wrapper_is_what_its_definition_says() -> None:
    """x_t / (cos + sin) is the rectified-flow sample at tau, and c_skip x_t + c_out v = x_tau - tau v; F follows."""
    x_t, t = some()
    c = coefficients(t)
    tau = rectified_time(t)
    network: Any = Curved()
    x_tau = column(c.c_in) * x_t
    (v,) = network(x_tau, c.c_noise, TEXT, False)
    torch.testing.assert_close(c.c_noise, 1000 * tau)
    clean = column(c.c_skip) * x_t + column(c.c_out) * v
    torch.testing.assert_close(clean, x_tau - column(tau) * v)
    flow = trig_velocity(network, x_t, t, TEXT)
    torch.testing.assert_close(flow, (column(t.cos()) * x_t - clean) / column(t.sin()))
    torch.testing.assert_close(consistency(x_t, flow, t), clean)
    x, noise = (torch.randn(1, *SHAPE, generator=seeded(i), dtype=torch.float64) for i in (3, 4))
    for i in range(len(t)):  # noised data, read as rectified flow
        mixed = noised(x, noise, t[i : i + 1]) * c.c_in[i]
        torch.testing.assert_close(mixed, (1 - tau[i]) * x + tau[i] * noise)


def test_bf16_times_are_those_of_the_release() -> None:
    times = torch.tensor(sampling_grid(4, 80.0), dtype=torch.float64)
    assert (1000 * times).tolist() == pytest.approx([0, 608.98, 852.90, 933.78, 987.65], abs=0.01)
    assert (1000 * round_time(times)).tolist() == pytest.approx([0, 608, 852, 932, 988])
    _, slope = torch.func.jvp(round_time, (times,), (torch.ones_like(times),))
    assert (slope == 1).all(), "rounding does not stop the derivative"


# --- the Gaussian flow


def test_teacher_flow_is_the_slope_of_its_trajectories() -> None:
    x_t, t = some()
    scale = DEVIATION * torch.ones_like(t)
    z = (end_of_trajectory(x_t, t) - MEAN) / column(scale)

    def at(time: Tensor) -> Tensor:
        return column(time.cos()) * MEAN + column(deviation(time)) * z

    torch.testing.assert_close(at(t), x_t)
    h = 1e-5
    torch.testing.assert_close(teacher_flow(x_t, t), (at(t + h) - at(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_consistency_function_maps_a_whole_trajectory_to_its_end() -> None:
    """The teacher's ODE, integrated by Runge-Kutta from t = 1.5 down, against the closed form at every step."""
    x, t = torch.randn(3, *SHAPE, generator=seeded(), dtype=torch.float64), torch.full((3,), 1.5, dtype=torch.float64)
    ends, h = [], 1.5 / 60
    for _ in range(59):
        ends.append(consistency(x, ideal_flow(x, t), t))
        k1 = teacher_flow(x, t)
        k2 = teacher_flow(x - h / 2 * k1, t - h / 2)
        k3 = teacher_flow(x - h / 2 * k2, t - h / 2)
        k4 = teacher_flow(x - h * k3, t - h)
        x, t = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t - h
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "bound"), [("exact", 1e-12), ("semi", 3e-4), ("finite", 3e-4)])
def test_tangent_vanishes_for_the_true_consistency_function_only(kind: Any, bound: float) -> None:
    x_t, t = some()
    teacher = teacher_flow(x_t, t)

    def size(flow: Any) -> float:
        change = flow_derivative(flow, x_t, t, teacher, kind, 1e-4)
        return tangent(flow(x_t, t), teacher, x_t, change, t, 1.0).abs().max().item()

    assert size(ideal_flow) < bound
    assert size(lambda x, time: 1.02 * ideal_flow(x, time)) > 1e-3


class Learner(Network):
    """v = (b(tau) + a(tau) x), enough for the consistency function of a Gaussian; a and b by a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2)).double()

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        seen = torch.stack([tau.flatten(), (math.pi * tau.flatten()).sin()], dim=1)
        a, b = self.net(seen).unbind(1)
        return column(b) + column(a) * x


@pytest.mark.parametrize(("kind", "bound"), [("scm", 0.03), ("dcm", 0.1)])
def test_training_finds_the_consistency_function(kind: Any, bound: float) -> None:
    """The method itself, on Gaussian data: f of points anywhere on a trajectory ends where the trajectory ends.

    dcm keeps a bias of its 48 Euler steps: measured 0.071 after 500 updates, 0.034 after 1,500.
    """
    teacher: Any = GaussianTeacher()
    student: Any = Learner()
    config = RCMConfig(
        consistency=kind, dmd_weight=0, guidance=1, tangent_warmup=100, sigma_mean=0.0, discrete_steps=48,
    )  # fmt: skip
    method = RCM(student, teacher, torch.zeros(1, 1, 1), config)
    assert set(method.networks) == {"student"}
    steps = 500
    optimiser = torch.optim.Adam(student.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)
    generator = seeded()

    def error() -> float:
        x_t, t = some(40)
        with torch.no_grad():
            made = consistency(x_t, trig_velocity(student, x_t, t, TEXT), t)
        return (made - end_of_trajectory(x_t, t)).square().mean().sqrt().item()

    before = error()
    for iteration in range(1, steps + 1):
        x = MEAN + DEVIATION * torch.randn(64, 2, 1, 1, 2, generator=generator)
        losses = method.losses(Batch(latents=x, text=torch.zeros(64, 1, 1)), iteration, generator)
        optimiser.zero_grad()
        losses[kind].backward()
        optimiser.step()
        rate.step()
    assert before > 0.3 and error() < bound


# --- derivatives


def test_derivatives_agree_in_float64() -> None:
    x_t, t = some()
    network: Any = Curved()
    teacher = teacher_flow(x_t, t)

    def flow(x: Tensor, time: Tensor) -> Tensor:
        return trig_velocity(network, x, time, TEXT)

    exact = flow_derivative(flow, x_t, t, teacher, "exact", 1e-4)
    h = 1e-5  # a central difference along the teacher's direction, independent of all three
    central = (flow(x_t + h * teacher, t + h) - flow(x_t - h * teacher, t - h)) / (2 * h)
    torch.testing.assert_close(exact, column(t.cos() * t.sin()) * central, rtol=1e-6, atol=1e-8)
    for kind in ("semi", "finite"):
        near = flow_derivative(flow, x_t, t, teacher, kind, 1e-4)  # type: ignore[arg-type]
        torch.testing.assert_close(near, exact, rtol=2e-3, atol=2e-3)
        nearer = flow_derivative(flow, x_t, t, teacher, kind, 1e-5)  # type: ignore[arg-type]
        assert (nearer - exact).abs().max() < 0.2 * (near - exact).abs().max(), "of first order in h"


def test_exact_derivative_of_a_wan_transformer() -> None:
    network = tiny_transformer()
    text = torch.randn(6, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(2))
    x_t, t = some()
    teacher = torch.randn(x_t.shape, generator=seeded(5), dtype=torch.float64)

    def flow(x: Tensor, time: Tensor) -> Tensor:
        return trig_velocity(network, x, time, text)

    with torch.no_grad():
        exact = flow_derivative(flow, x_t, t, teacher, "exact", 1e-4)
        near = flow_derivative(flow, x_t, t, teacher, "finite", 3e-5)
        semi = flow_derivative(flow, x_t, t, teacher, "semi", 3e-5)
    assert not exact.requires_grad
    assert (near - exact).norm() < 0.02 * exact.norm() and (semi - exact).norm() < 0.02 * exact.norm()


def test_tangent_warmup() -> None:
    x_t, t = some()
    flow, teacher, change = (torch.randn(x_t.shape, generator=seeded(i), dtype=torch.float64) for i in (7, 8, 9))
    cos, sin = column(t.cos()), column(t.sin())
    full = -(cos**2) * (flow - teacher) - cos * sin * x_t - change
    for form in ("released", "paper"):
        torch.testing.assert_close(tangent(flow, teacher, x_t, change, t, 1.0, form), full)  # type: ignore[arg-type]
    start = tangent(flow, teacher, x_t, change, t, 0.0, "released")
    torch.testing.assert_close(start, -cos * (flow - teacher) - change)
    torch.testing.assert_close(tangent(flow, teacher, x_t, change, t, 0.0, "paper"), -(cos**2) * (flow - teacher))


def test_normalised_by_the_whole_sample() -> None:
    g = torch.randn(3, *SHAPE, generator=seeded(), dtype=torch.float64)
    out = normalised(g)
    torch.testing.assert_close(out[0], g[0] / (g[0].norm() + 0.1))
    g[1, 0, 0, 0, 0] = math.nan
    assert (normalised(g)[1] == 0).all() and torch.equal(normalised(g)[2], out[2])


# --- the method on a tiny Wan transformer


def tiny(**options: Any) -> tuple[RCM, Batch]:
    teacher = tiny_transformer().requires_grad_(False)
    student = tiny_transformer(seed=3)
    x = torch.randn(3, *SHAPE, generator=seeded())
    text = torch.randn(3, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    method = RCM(student, teacher, torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH), RCMConfig(**options))
    return method, Batch(latents=x, text=text)


def test_alternation_and_simulation_steps() -> None:
    config = RCMConfig(tangent_warmup=3)
    moves = [config.student_moves(i) for i in range(1, 19)]
    assert moves == [True] * 3 + ([False] * 4 + [True]) * 3
    assert [config.matches(i) for i in (3, 4)] == [False, True]
    student = [config.simulation(i) for i in range(4, 60) if config.student_moves(i)]
    critic = [config.simulation(i) for i in range(4, 60) if not config.student_moves(i)]
    assert sorted(set(student)) == [1, 2, 3, 4] and student[:5] == [1, 2, 3, 4, 1]
    assert critic[:5] == [1, 2, 3, 4, 1]
    alone = RCMConfig(dmd_weight=0)
    assert all(alone.student_moves(i) and not alone.matches(i) for i in (1, 1001, 1002))


def test_terms_and_whom_they_reach() -> None:
    method, batch = tiny(tangent_warmup=1)
    assert set(method.losses(batch, 1, seeded())) == {"scm"}
    assert set(method.losses(batch, 2, seeded())) == {"fake_score"} and method.turn(2) == ("fake_score",)
    terms = method.losses(batch, 6, seeded())
    assert set(terms) == {"scm", "dmd"} and method.turn(6) == ("student",)
    for term in terms.values():
        method.student.zero_grad()
        term.backward()
        assert method.student.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0  # type: ignore[index, union-attr]
    fake = method.networks["fake_score"]
    assert all(p.grad is None for net in (fake, method.teacher) for p in net.parameters())
    method.student.zero_grad(set_to_none=True)
    method.losses(batch, 2, seeded())["fake_score"].backward()
    assert all(p.grad is None for p in method.student.parameters())
    assert fake.proj_out.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert set(tiny(tangent_warmup=1, consistency="dcm")[0].losses(batch, 6, seeded())) == {"dcm", "dmd"}
    assert set(tiny(tangent_warmup=0, consistency_weight=0)[0].losses(batch, 5, seeded())) == {"dmd"}


def test_matching_by_hand() -> None:
    """At the start the fake score is the unguided teacher: no gradient without guidance, (w - 1) of it with."""
    method, batch = tiny(tangent_warmup=0, consistency_weight=0, guidance=1.0)
    assert method.losses(batch, 5, seeded())["dmd"].item() == 0
    method, _ = tiny(tangent_warmup=0, consistency_weight=0, guidance=3.0)
    term = method.losses(batch, 5, seeded())["dmd"].item()
    generator = seeded()  # the same draws again
    with torch.no_grad():
        made = method._simulate(batch.latents, batch.text, method.config.simulation(5), generator)
        t, x_t = method._noise_again(made, generator)
        cond = trig_velocity(method.teacher, x_t, t, batch.text)
        bare = trig_velocity(method.teacher, x_t, t, torch.zeros_like(batch.text))
        real = consistency(x_t, bare + 3 * (cond - bare), t)
        difference = 2 * column(t.sin()) * (cond - bare)  # x0 = cos x - sin F, and F_guided - F_fake = 2 (F_c - F_u)
        weight = (made - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        expected = (difference / weight).square().sum(dim=(1, 2, 3, 4)).mean().item()
    assert term == pytest.approx(expected, rel=1e-6)


def test_simulation_has_a_gradient_through_its_last_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = tiny(fixed_times=True)
    calls: list[tuple[float, bool]] = []
    plain = RCM._flow

    def watched(self: RCM, network: nn.Module, text: Tensor) -> Any:
        inner = plain(self, network, text)

        def flow(x_t: Tensor, t: Tensor) -> Tensor:
            calls.append((t[0].item(), torch.is_grad_enabled()))
            return inner(x_t, t)

        return flow

    monkeypatch.setattr(RCM, "_flow", watched)
    made = method._simulate(batch.latents, batch.text, 4, seeded())
    assert calls == [(math.pi / 2, False), (1.5, False), (1.4, False), (1.0, True)]
    assert made.requires_grad and made.shape == batch.latents.shape
    calls.clear()
    method.config = RCMConfig(fixed_times=False)
    method._simulate(batch.latents, batch.text, 4, seeded())
    times = [t for t, _ in calls]
    assert times == sorted(times, reverse=True) and times[0] == math.pi / 2


def test_discrete_target_is_some_teacher_steps_nearer() -> None:
    """For the Gaussian's own consistency function the loss falls with the square of the step; elsewhere it does not."""

    class Ideal(Network):
        def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
            t = trig_time(tau.flatten().clamp(min=1e-9))
            total = column(t.cos() + t.sin())
            flow = ideal_flow(x * total, t)
            return total * flow - column(t.cos() - t.sin()) * x * total

    def loss(steps: int) -> float:
        method = RCM(
            Ideal(), GaussianTeacher(), torch.zeros(1, 1, 1),  # type: ignore[arg-type]
            RCMConfig(consistency="dcm", dmd_weight=0, guidance=1, discrete_steps=steps),
        )  # fmt: skip
        x = MEAN + DEVIATION * torch.randn(256, 2, 1, 1, 2, generator=seeded())
        return method.losses(Batch(latents=x, text=torch.zeros(256, 1, 1)), 1, seeded())["dcm"].item()

    assert loss(400) < 0.02 * loss(48) < 0.02 * 100


# --- sampling


def test_sampler_by_hand() -> None:
    """x <- tau_0 eps; x0 = x - tau v; x <- (1 - tau') x0 + tau' eps'; the network's times rounded to bf16."""
    network = tiny_transformer()
    text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    noises = [torch.randn(2, *SHAPE, generator=seeded(i)) for i in range(4)]
    for rounded in (False, True):
        record = rcm_sampling(RCMConfig(m=3, bf16_times=rounded))
        assert record["sampler"] == "sde" and record["initial"] == "scaled"
        points = record["outer_grid"]
        rest = iter(noises[1:])
        made = sample_plain(
            network, text, noises[0], torch.tensor(points, dtype=torch.float64), "sde", lambda: next(rest),  # noqa: B023
            scaled=True, bf16_times=record["time_precision"] == "bfloat16",
        )  # fmt: skip
        x, again = noises[0].double() * points[-1], iter(noises[1:])
        for tau, nearer in zip(points[:0:-1], points[-2::-1], strict=True):
            seen = torch.tensor(1000 * tau, dtype=torch.bfloat16 if rounded else torch.float64).double()
            with torch.no_grad():
                v = network(x.float(), seen.expand(2), text, return_dict=False)[0]
            x = x - tau * v.double()
            x = (1 - nearer) * x + (nearer * next(again) if nearer else 0)
        torch.testing.assert_close(made.double(), x, rtol=1e-4, atol=1e-5)


def test_grid_is_the_released_list_cut_to_m() -> None:
    whole = sampling_grid(4, 80.0)
    for m in (1, 2, 3):
        assert sampling_grid(m, 80.0) == (0.0, *whole[-m:])
    sigma = math.tan(trig_time(torch.tensor(whole[-1], dtype=torch.float64)).item())
    assert sigma == pytest.approx(80)


def test_discrete_times_are_shifted() -> None:
    assert rational_shift(torch.tensor(0.5), 5.0).item() == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 5}, "1 to 4 steps"),
        ({"sigma_max": 10.0}, "above tan"),
        ({"bf16_times": True, "derivative": "finite"}, "bf16 times"),
        ({"consistency_weight": 0.0, "dmd_weight": 0.0}, "nothing is learned"),
        ({"consistency_weight": 0.0}, "nothing to warm up"),
        ({"student_every": 1}, "student_every is 1"),
        ({"simulated_steps": 5}, "simulated_steps is 5"),
        ({"discrete_skip": 49}, "discrete_skip is 49"),
        ({"derivative": "jvp"}, "exact, semi, finite"),
        ({"step": 0.0}, "step is 0.0"),
        ({"gamma_dmd": 0.0}, "above 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RCMConfig(**options)


def test_cost_of_the_parts() -> None:
    config, shape = RCMConfig(tangent_warmup=0), Shape(10, None)
    assert rcm_cost(config, 1, shape).forwards == (config.simulation(1) + 1) * 10
    student = rcm_cost(config, 5, shape)
    assert student.backwards == 20 and student.forwards == 20 + 30 + (config.simulation(5) + 1) * 10 + 20
