"""Stage 1: derivatives against forward-mode AD and closed forms, fixed points of the loss, and who gets gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from students.errors import ConfigError
from students.method import Batch
from students.times import Shift, grid, sample_times
from students.tm_mf import (
    TMMF,
    Points,
    TMMFConfig,
    adaptive_loss,
    draw,
    exact_derivative,
    finite_derivative,
    slope,
    tm_mf_loss,
)
from students.tmd import Features, TMDStudent
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_transformer

SHAPE = (CHANNELS, 2, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


class Toy(nn.Module):
    """A student whose average velocity is a given function of (parameter, y_s, s, r, text); it counts its calls."""

    target = "x1-x"

    def __init__(self, u: Any, parameter: Tensor) -> None:
        super().__init__()
        self.u, self.parameter = u, nn.Parameter(parameter)
        self.backbones: list[Tensor] = []
        self.heads: list[tuple[Tensor, Tensor]] = []

    def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Features:
        self.backbones.append(text)
        return Features(text, (t, t), text)

    def average_velocity(
        self, y_s: Tensor, s: Tensor, r: Tensor, features: Features, *, y1: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        assert len(y_s) == len(s) == len(r) == len(features.text) == len(y1) == len(x_t) == len(t)
        self.heads.append((s, r))
        return self.u(self.parameter, y_s, s, r, features.text)


def texts(batch: int) -> tuple[Tensor, Tensor]:
    """Captions all 1, negative prompt all 0."""
    return torch.ones(batch, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifts the casts to float32 inside Wan's blocks, whose rounding would drown small differences."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def smooth_student(**options: Any) -> TMDStudent:
    """A random float64 student with slow sinusoids: Wan's fastest turns by 5 radians over delta."""
    student = TMDStudent.from_teacher(tiny_transformer(), h=2, gate=0.0, **options).double()
    generator = seeded(3)
    for parameter in student.interval_embedder.parameters():  # zero at the start: (s - r) would not matter
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3

    class Waves(nn.Module):
        def forward(self, time: Tensor) -> Tensor:
            phases = time.double()[:, None] / 1000 * torch.arange(1, 9, dtype=torch.float64)
            return torch.cat([phases.cos(), phases.sin()], dim=1)

    student.condition_embedder.timesteps_proj = Waves()
    return student


# --- derivatives


def test_both_derivatives_on_an_analytic_velocity() -> None:
    """u = sin(3 s) y^2 + s r: du/ds = 3 cos(3 s) y^2 + 2 sin(3 s) y v + r."""
    y, v = torch.randn(2, 4, *SHAPE, generator=seeded(), dtype=torch.float64)
    s = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    r = torch.tensor([0.0, 0.2, 0.4, 0.1], dtype=torch.float64)

    def u(y_s: Tensor, time: Tensor) -> Tensor:
        return (3 * column(time)).sin() * y_s**2 + column(time * r)

    exact = 3 * (3 * column(s)).cos() * y**2 + 2 * (3 * column(s)).sin() * y * v + column(r)
    torch.testing.assert_close(exact_derivative(u, y, v, s), exact, rtol=1e-12, atol=1e-12)
    coarse, fine = (finite_derivative(u, y, v, s, r, delta) - exact for delta in (0.004, 0.002))
    assert fine.abs().max() < 1e-3
    torch.testing.assert_close(coarse, 4 * fine, rtol=1e-3, atol=1e-8)  # second order


def test_stencil_is_one_sided_at_the_ends() -> None:
    """Never below r, 0.001 or above 0.999; always along the path."""
    delta = 0.005
    s = torch.tensor([0.5, 0.503, 0.997, 0.002], dtype=torch.float64)
    r = torch.tensor([0.2, 0.5, 0.909, 0.0], dtype=torch.float64)
    y, v = torch.randn(2, 4, *SHAPE, generator=seeded(), dtype=torch.float64)
    seen = []

    def u(y_s: Tensor, time: Tensor) -> Tensor:
        torch.testing.assert_close(y_s, y + column(time - s) * v)
        seen.append(time)
        return column(time) * y_s

    slope = finite_derivative(u, y, v, s, r, delta)
    low, high = torch.stack(seen).sort(dim=0).values
    torch.testing.assert_close(low, torch.tensor([0.495, 0.5, 0.992, 0.001], dtype=torch.float64))
    torch.testing.assert_close(high, torch.tensor([0.505, 0.508, 0.999, 0.007], dtype=torch.float64))
    torch.testing.assert_close(slope, y + column(s) * v, rtol=0, atol=2 * delta * v.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"fusion": "concat"}, {"target": "x"}])
def test_finite_against_forward_mode_on_a_student(options: dict[str, str], all_float64: None) -> None:
    student = smooth_student(**options)
    x_t, y_s, y1, v = torch.randn(4, 2, *SHAPE, generator=seeded(), dtype=torch.float64)
    text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1), dtype=torch.float64)
    t, s, r = torch.tensor([[0.9, 0.999], [0.6, 0.95], [0.0, 0.909]], dtype=torch.float64)
    features = student.backbone(x_t, t, text)

    def u(y: Tensor, time: Tensor) -> Tensor:
        return student.average_velocity(y, time, r, features, y1=y1, x_t=x_t, t=t)

    with torch.no_grad():
        exact = exact_derivative(u, y_s, v, s)
        assert exact.abs().mean() > 0.01
        assert (exact_derivative(u, y_s, 0 * v, s) - exact).abs().mean() > 0.001, "y_s must matter"
        torch.testing.assert_close(finite_derivative(u, y_s, v, s, r, 1e-5), exact, rtol=1e-6, atol=1e-8)


def test_loss_with_either_derivative(all_float64: None) -> None:
    student = smooth_student()
    x = torch.randn(4, *SHAPE, generator=seeded(), dtype=torch.float64)
    text = torch.randn(4, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1), dtype=torch.float64)
    errors = [
        tm_mf_loss(student, x, text, text[:1] * 0, seeded(2), TMMFConfig(matching_share=0, **options))[1]["mf_error"]
        for options in ({"derivative": "exact"}, {"delta": 1e-5}, {"delta": 0.005})
    ]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(errors[2], errors[0], rtol=1e-2, atol=0)
    assert errors[1] != errors[0]


# --- fixed points


def test_straight_flow_is_exact() -> None:
    """A single target point c: u = (y_s - c) / s = y1 - c is constant along every path, so the loss is zero."""
    batch = 64
    x = torch.zeros(batch, *SHAPE, dtype=torch.float64)

    class Straight(Toy):
        target = "x"  # y = x = 0 for every sample

    for derivative in ("finite", "exact"):
        config = TMMFConfig(matching_share=0.3, guidance=1.0, derivative=derivative)
        student = Straight(lambda a, y, s, r, _: a * y / column(s), torch.tensor(1.0, dtype=torch.float64))
        _, figures = tm_mf_loss(student, x, *texts(batch), seeded(), config)
        assert figures["tm_error"] < 1e-24 and figures["mf_error"] < 1e-18
        student.parameter.data *= 0.9
        assert tm_mf_loss(student, x, *texts(batch), seeded(), config)[1]["mf_error"] > 1e-3


def test_gaussian_flow_map_is_a_fixed_point() -> None:
    """y ~ N(0, 2): the flow map is y_r = y_s sd(r) / sd(s), sd(s)^2 = 2 (1 - s)^2 + s^2, and u = (y_s - y_r) / (s - r).

    At the true u the expected gradient of the loss vanishes (with the wrong sign in the identity the ratio is 0.5).
    """
    batch = 200_000
    x = torch.randn(batch, 1, 1, 1, 1, generator=seeded(), dtype=torch.float64)  # y = x1 - x has variance 2

    def deviation(s: Tensor) -> Tensor:
        return (2 * (1 - s) ** 2 + s**2).sqrt()

    def u(scale: Tensor, y: Tensor, s: Tensor, r: Tensor, _: Tensor) -> Tensor:
        # r = s: the limit, d log sd / ds
        at_s = (s - 2 * (1 - s)) / deviation(s) ** 2
        gap = torch.where(s > r, s - r, 1)
        return scale * y * column(torch.where(s > r, (1 - deviation(r) / deviation(s)) / gap, at_s))

    # c far above the error makes the adaptive weight a constant, which Monte Carlo can average.
    config = TMMFConfig(n=3, gamma_inner=3, matching_share=0.0, guidance=1.0, c_factor=1e9)
    gradients = []
    for scale in (1.0, 0.5):
        student = Toy(u, torch.tensor(scale, dtype=torch.float64))
        tm_mf_loss(student, x, *texts(batch), seeded(1), config)[0].backward()
        gradients.append(student.parameter.grad)
    assert abs(gradients[0] / gradients[1]) < 0.02


def test_guided_fixed_point() -> None:
    """Constant velocity per text: captions settle at w E[v] + (1 - w) u(negative), dropped samples at E[v]."""
    batch, mean, w = 100_000, 0.7, 3.0
    x = mean + torch.randn(batch, 1, 1, 1, 1, generator=seeded(), dtype=torch.float64)
    config = TMMFConfig(matching_share=1.0, guidance=w, dropout=0.3, c_factor=1e9)

    def gradient(table: list[float]) -> Tensor:
        student = Toy(lambda a, y, s, r, text: a[text[:, 0, 0].long()].view(-1, 1, 1, 1, 1), torch.tensor(table))
        student.double()
        tm_mf_loss(student, x, *texts(batch), seeded(1), config)[0].backward()
        assert student.parameter.grad is not None
        return student.parameter.grad

    bare = 0.2  # the model's own velocity without text, entry 0; entry 1 is the caption's
    one, two = gradient([bare, 0.0]), gradient([bare, 1.0])
    assert one[1] / (one[1] - two[1]) == pytest.approx(w * mean + (1 - w) * bare, abs=0.05)
    three = gradient([bare + 1, 0.0])
    assert bare + one[0] / (one[0] - three[0]) == pytest.approx(mean, abs=0.05)


# --- the parts


def test_adaptive_loss_by_hand() -> None:
    u = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64).view(2, 2, 1, 1, 1).requires_grad_()
    loss = adaptive_loss(u, torch.zeros_like(u), c_factor=0.5)  # errors 25 and 1, c = 0.5 * 2
    assert loss.item() == pytest.approx((25 / 26 + 1 / 2) / 2)
    loss.backward()
    assert u.grad is not None  # the denominator is constant: 2 u / (e + c) / batch
    torch.testing.assert_close(u.grad.flatten(), torch.tensor([3 / 26, 4 / 26, 0, 1 / 2], dtype=torch.float64))


def test_draw() -> None:
    config = TMMFConfig(m=3, n=4, gamma_inner=5)
    batch = 4000
    plan = draw(torch.zeros(batch, 1, 1, 1, 1), seeded(), config)
    outer, inner = grid(3, 10), grid(4, 5)
    points, counts = plan.t.unique(return_counts=True)
    torch.testing.assert_close(points, outer[1:], rtol=0, atol=0)
    assert (counts / batch - 1 / 3).abs().max() < 0.03
    assert (plan.r == plan.s).double().mean() == pytest.approx(0.75, abs=0.001)
    moving = plan.r < plan.s
    assert ((plan.r <= plan.s) & (plan.s >= 0.001) & (plan.s <= 0.999)).all()
    for s, r in zip(plan.s[moving].tolist(), plan.r[moving].tolist(), strict=True):
        assert r == max(point for point in inner.tolist() if point <= s)
    assert plan.dropped.double().mean() == pytest.approx(0.1, abs=0.02)
    # Quantiles of uniform times shifted by 3: the median is 3 / 4.
    assert plan.s.median() == pytest.approx(0.75, abs=0.02)
    assert abs((plan.x1 * plan.y1).mean()) < 0.06


def test_share_is_right_in_small_batches() -> None:
    config = TMMFConfig()
    counts = []
    for seed in range(200):
        plan = draw(torch.zeros(3, 1, 1, 1, 1), seeded(seed), config)
        counts.append(int((plan.r == plan.s).sum()))
    assert set(counts) == {2, 3} and sum(counts) / 600 == pytest.approx(0.75, abs=0.03)
    assert all(
        (lambda p: (p.r == p.s).sum() == 3)(draw(torch.zeros(4, 1, 1, 1, 1), seeded(i), config)) for i in range(9)
    )


def test_work_is_done_only_where_it_counts() -> None:
    batch = 8
    x = torch.zeros(batch, *SHAPE, dtype=torch.float64)

    def toy(**options: float) -> Toy:
        student = Toy(lambda a, y, s, r, _: a * y, torch.tensor(1.0, dtype=torch.float64))
        tm_mf_loss(student, x, *texts(batch), seeded(), TMMFConfig(**options))
        return student

    dropped = toy(dropout=1.0)
    assert len(dropped.backbones) == 1 and (dropped.backbones[0] == 0).all(), "dropped samples are not guided"
    plain = toy(dropout=0.0, matching_share=1.0)
    assert (len(plain.backbones), len(plain.heads)) == (2, 2), "r = s needs no derivative"
    assert (plain.backbones[0] == 1).all() and (plain.backbones[1] == 0).all()
    mixed = toy(dropout=0.0, matching_share=0.5)
    (s, r), (s_bare, r_bare), (s_high, r_high), (s_low, r_low) = mixed.heads
    assert len(s) == 8 and (r < s).sum() == 4
    assert torch.equal(s_bare, s) and torch.equal(r_bare, s), "the guiding velocity is instantaneous"
    assert torch.equal(r_high, r[r < s]) and torch.equal(r_low, r_high) and (s_low < s_high).all()
    assert len(toy(guidance=1.0, matching_share=0.5).heads) == 3


@pytest.mark.parametrize("options", [{}, {"fusion": "concat"}, {"target": "x"}])
def test_gradients_and_determinism(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    student = TMDStudent.from_teacher(tiny_transformer(), h=2, **options)
    x = torch.randn(4, *SHAPE, generator=seeded())
    text = torch.randn(4, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    method = TMMF(student, text[:1] * 0, TMMFConfig(matching_share=0.5))
    assert method.turn(1) == method.turn(5) == ("student",)
    losses = [method.losses(Batch(latents=x, text=text), 1, seeded(seed))["tm_mf"] for seed in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert student.patch_embedding.weight.grad.any() and student.backbone_blocks[0].attn1.to_q.weight.grad.any()
    metrics = method.metrics()
    assert metrics["tm_error"] > 0 and metrics["mf_error"] > 0
    assert ("gate" in metrics) == (options.get("fusion") != "concat")
    if "gate" in metrics:
        assert metrics["gate"] == pytest.approx(1 / (1 + torch.tensor(3.0).exp().item()))


def test_derivative_leaves_bf16_autocast() -> None:
    student = smooth_student().float()
    x_t, y_s, y1, v = torch.randn(4, 2, *SHAPE, generator=seeded())
    text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    t, s, r = torch.tensor([[0.9, 0.999], [0.6, 0.95], [0.0, 0.909]], dtype=torch.float64)
    points = Points(y_s, s, r, y1, x_t, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = student.backbone(x_t, t, text)
        inside = slope(student, points, features, v, TMMFConfig())
    assert features.tokens.dtype == torch.bfloat16
    features = features._replace(tokens=features.tokens.float(), text=features.text.float())

    def u(y: Tensor, time: Tensor) -> Tensor:
        return student.average_velocity(y, time, r, features, y1=y1)

    with torch.no_grad():
        torch.testing.assert_close(inside, finite_derivative(u, y_s, v, s, r, 0.005), rtol=0, atol=0)


def test_training_lowers_the_error() -> None:
    """A few updates on one batch; the error is measured before and after with the same draws."""
    torch.manual_seed(0)
    student = TMDStudent.from_teacher(tiny_transformer(), h=2)
    x = torch.randn(8, *SHAPE, generator=seeded()) * 0.1
    text = torch.randn(8, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    method = TMMF(student, text[:1] * 0, TMMFConfig(guidance=1.0))
    batch = Batch(latents=x, text=text)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)

    def errors() -> dict[str, float]:
        with torch.no_grad():
            method.losses(batch, 1, seeded(99))
        return method.metrics()

    before, generator = errors(), seeded(5)
    for iteration in range(1, 31):
        optimiser.zero_grad()
        sum(method.losses(batch, iteration, generator).values()).backward()
        optimiser.step()
    after = errors()
    assert after["tm_error"] < 0.5 * before["tm_error"] and after["mf_error"] < 0.9 * before["mf_error"]


def test_transition_matching_alone_leaves_u_independent_of_r() -> None:
    """With r = s in every sample nothing trains the embedding of s - r > 0, so it must stay zero."""
    torch.manual_seed(0)
    student = TMDStudent.from_teacher(tiny_transformer(), h=2)
    x, text = torch.randn(4, *SHAPE, generator=seeded()), torch.randn(4, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    method = TMMF(student, text[:1] * 0, TMMFConfig(guidance=1.0, matching_share=1.0))
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for iteration in range(1, 4):
        optimiser.zero_grad()
        sum(method.losses(Batch(latents=x, text=text), iteration, seeded(iteration)).values()).backward()
        optimiser.step()
    s = torch.full((4,), 0.8, dtype=torch.float64)
    with torch.no_grad():
        features = student.backbone(x, s, text)
        near, far = (student.average_velocity(x, s, r, features, y1=x, x_t=x, t=s) for r in (s, s * 0.1))
    assert torch.equal(near, far)
    assert "mf_error" not in method.metrics()


@pytest.mark.parametrize("wrong", [{"m": 0}, {"n": 0}, {"delta": 0.0}, {"dropout": 1.5}, {"derivative": "jvp"}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        TMMFConfig(**wrong)


def test_times_of_s_match_the_shift_used() -> None:
    """The draw uses sample_times in its documented range (guards the clamp that keeps s at or below 0.999)."""
    assert sample_times(10_000, Shift(gamma=3.0), seeded()).max() <= 0.999
