"""Stage 2: formulas by hand, Gaussians in closed form, the whole alternation on a Gaussian teacher, and who moves."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from students.base import clean, guided, velocity
from students.dmd2v import DMD2V, DMD2VConfig
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
from students.method import Batch, draw_noise, interpolate
from students.times import Shift, grid, sample_times
from students.tmd import Features, TMDStudent
from students.tmd_stage2 import Stage2Config, TMDStage2, rollout_sample
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_transformer

SHAPE = (CHANNELS, 2, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


def gaussian_estimate(x_t: Tensor, t: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """E[x | x_t] for x ~ N(mean, deviation^2): mean + (1 - t) d^2 / ((1 - t)^2 d^2 + t^2) (x_t - (1 - t) mean)."""
    t = column(t)
    gain = (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


# --- formulas by hand


def test_vsd_gradient_by_hand() -> None:
    x_hat = torch.tensor([[1.0, 5.0], [0.0, 0.0]]).view(2, 2, 1, 1, 1)
    g_fake = torch.tensor([[2.0, 2.0], [1.0, -1.0]]).view(2, 2, 1, 1, 1)
    g_teacher = torch.tensor([[0.0, 3.0], [1.0, -1.0]]).view(2, 2, 1, 1, 1)
    # Sample 1: difference (2, -1); mean |x_hat - g_teacher| = (1 + 2) / 2, mean |difference| = (2 + 1) / 2.
    by_x_hat = vsd_gradient(x_hat, g_fake, g_teacher, "x_hat")
    assert by_x_hat[0].flatten().tolist() == pytest.approx([2 / 1.5, -1 / 1.5])
    assert by_x_hat[1].flatten().tolist() == [0, 0]
    x_hat[0, 0] = 7.0  # mean |x_hat - g_teacher| = (7 + 2) / 2; the printed norm does not care
    assert vsd_gradient(x_hat, g_fake, g_teacher, "x_hat")[0].flatten().tolist() == pytest.approx([2 / 4.5, -1 / 4.5])
    printed = vsd_gradient(x_hat, g_fake, g_teacher, "printed")
    assert printed[0].flatten().tolist() == pytest.approx([2 / 1.5, -1 / 1.5])
    assert printed[1].flatten().tolist() == [0, 0], "equal scores: the floor keeps 0 / 0 away"
    tiny = vsd_gradient(g_teacher, g_teacher + 1e-9, g_teacher, "x_hat")  # norm 0, so the floor 1e-6
    assert tiny[0, 0].item() == pytest.approx(1e-3, rel=1e-3)


def test_vsd_loss_has_the_gradient_it_promises() -> None:
    x_hat = torch.randn(3, *SHAPE, generator=seeded(), requires_grad=True)
    gradient = torch.randn(3, *SHAPE, generator=seeded(1))
    loss = vsd_loss(x_hat, gradient)
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(x_hat.grad, gradient / gradient.numel(), rtol=1e-4, atol=1e-9)


def test_vsd_gradient_carries_no_graph() -> None:
    parts = [torch.randn(1, *SHAPE, requires_grad=True) for _ in range(3)]
    assert not vsd_gradient(*parts, "x_hat").requires_grad


def test_gan_losses_are_log_likelihoods() -> None:
    fake, real = torch.tensor([[0.3, -1.2], [2.0, 0.0]]), torch.tensor([[1.5, 0.4], [-0.7, 3.0]])
    sigmoid = lambda logits: [1 / (1 + math.exp(-z)) for z in logits.flatten().tolist()]  # noqa: E731
    minimax = sum(math.log(p) for p in sigmoid(real)) / 4 + sum(math.log(1 - p) for p in sigmoid(fake)) / 4
    assert discriminator_loss(fake, real).item() == pytest.approx(-minimax, rel=1e-6)
    assert generator_gan_loss(fake).item() == pytest.approx(-sum(math.log(p) for p in sigmoid(fake)) / 4, rel=1e-6)
    assert generator_gan_loss(torch.tensor([[-200.0]])).item() == pytest.approx(200), "non-saturating"
    assert approximate_r1(real, real + torch.tensor([[1.0, 2.0], [0.0, 1.0]])).item() == pytest.approx(6 / 4)


def test_fake_score_loss() -> None:
    v, x_hat, noise = (torch.randn(2, *SHAPE, generator=seeded(i), requires_grad=True) for i in range(3))
    loss = fake_score_loss(v, x_hat, noise)
    expected = ((v - noise + x_hat) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert v.grad is not None and x_hat.grad is None and noise.grad is None


# --- Gaussians in closed form


@pytest.mark.parametrize("norm", ["x_hat", "printed"])
def test_vsd_drives_a_generator_to_the_right_gaussian(norm: Any) -> None:
    """x_hat = a + b z per coordinate, fake and teacher scores exact: both end within 0.05 of N(2, 1.5^2)."""
    mean, deviation = torch.tensor(2.0), torch.tensor(1.5)
    a, b = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    optimiser = torch.optim.Adam([a, b], lr=0.05)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=400)
    generator = seeded()
    for _ in range(400):
        x_hat = a + b * torch.randn(64, 16, 1, 1, 1, generator=generator)
        t, noise = sample_times(64, Shift(gamma=5.0), generator), draw_noise(x_hat, generator)
        with torch.no_grad():
            x_t, time = interpolate(x_hat, noise, t), t.float()
            g_fake, g_teacher = gaussian_estimate(x_t, time, a, b), gaussian_estimate(x_t, time, mean, deviation)
        optimiser.zero_grad()
        vsd_loss(x_hat, vsd_gradient(x_hat, g_fake, g_teacher, norm)).backward()
        optimiser.step()
        rate.step()
    assert a.item() == pytest.approx(2.0, abs=0.05)
    assert abs(b.item()) == pytest.approx(1.5, abs=0.05)


class GaussianTransformer(nn.Module):
    """Called like Wan's transformer; its velocity is exact for x ~ N(mean, exp(log_deviation)^2)."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_deviation = nn.Parameter(torch.tensor(deviation).log())
        self.patch_embedding = SimpleNamespace(weight=torch.zeros(()))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        t = (timestep / 1000).float()
        g = gaussian_estimate(hidden_states, t, self.mean, self.log_deviation.exp())
        return ((hidden_states - g) / column(t),)


def test_the_whole_alternation_on_a_gaussian_teacher() -> None:
    """Nothing is told to the fake score: it learns the student's distribution while the student moves to N(1, 0.5^2).

    Measured ends over seeds 0 to 4: mean within 0.002, deviation within 0.007; the tolerance is 0.03.
    """

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(1.2))

    teacher: Any = GaussianTransformer(1.0, 0.5).requires_grad_(False)
    student = Affine()
    config = DMD2VConfig(gan_weight=0.0, guidance=1.0)
    method = DMD2V(
        student,
        lambda x, text, generator: student.a + student.b * draw_noise(x, generator),
        teacher,
        torch.zeros(1, 1, 1),
        config,
    )
    assert set(method.networks) == {"student", "fake_score"}
    rates = {"student": 0.03, "fake_score": 0.1}  # a slower fake score lets the student overshoot
    optimisers = {name: torch.optim.Adam(net.parameters(), rates[name]) for name, net in method.networks.items()}
    batch, generator = Batch(latents=torch.zeros(128, 8, 1, 1, 1), text=torch.zeros(128, 1, 1)), seeded()
    steps = 1500
    for iteration in range(1, steps + 1):
        for name, optimiser in optimisers.items():
            optimiser.param_groups[0]["lr"] = rates[name] * (1 - iteration / steps)
            optimiser.zero_grad()
        sum(method.losses(batch, iteration, generator).values()).backward()
        for name in method.turn(iteration):
            optimisers[name].step()
    assert student.a.item() == pytest.approx(1.0, abs=0.03) and abs(student.b.item()) == pytest.approx(0.5, abs=0.03)
    assert method.fake_score.mean.item() == pytest.approx(1.0, abs=0.03)  # type: ignore[operator, union-attr]
    assert teacher.mean.item() == 1.0


@pytest.mark.parametrize(("form", "variance"), [("ours", 1.0), ("printed", 1.22)])
def test_variance_of_x_hat_for_exact_inner_samples(form: Any, variance: float) -> None:
    """x ~ N(0, 1), t = 0.909, y from the exact posterior given x_t: Var(x_t - t y) = 1, Var(x1 - y) = 1.22."""
    config = Stage2Config(m=2, gamma_outer=10.0, x_hat=form)
    t1 = grid(2, 10.0)[1].item()
    assert t1 == pytest.approx(0.909, abs=1e-3)
    power = (1 - t1) ** 2 + t1**2
    noise = seeded(9)

    class Posterior:
        target = "x1-x"

        def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
            self.t = t
            return x_t

        def rollout(self, features: Tensor, y1: Tensor, inner: Tensor, *, x_t: Tensor, t: Tensor) -> Tensor:
            # Cov(x1 - x, x_t) = t - (1 - t); Var(x1 - x) = 2.
            mean = (2 * t1 - 1) / power * x_t
            return mean + math.sqrt(2 - (2 * t1 - 1) ** 2 / power) * draw_noise(y1, noise)

    student: Any = Posterior()
    x = torch.randn(400_000, 1, 1, 1, 1, generator=seeded())
    x_hat = rollout_sample(student, x, torch.zeros(len(x), 1, 1), seeded(1), config)
    chosen = x_hat[student.t == t1]
    assert len(chosen) == pytest.approx(len(x) / 2, rel=0.02)
    assert chosen.var().item() == pytest.approx(variance, abs=0.01)


# --- how x_hat is made


class Recorder:
    """A student that notes what it is asked and answers y = 3."""

    def __init__(self, target: str) -> None:
        self.target = target

    def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Features:
        self.x_t, self.t = x_t, t
        return Features(x_t, (t, t), text)

    def rollout(self, features: Features, y1: Tensor, inner_grid: Tensor, *, x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t is self.x_t and t is self.t
        self.y1, self.grid = y1, inner_grid
        return torch.full_like(y1, 3.0)


def test_x_hat_and_its_inputs() -> None:
    x, text = torch.randn(50, *SHAPE, generator=seeded()), torch.zeros(50, 1, 1)
    student: Any = Recorder("x1-x")
    x_hat = rollout_sample(student, x, text, seeded(), Stage2Config(m=3, n=4))
    torch.testing.assert_close(x_hat, student.x_t - 3 * column(student.t).float())
    assert set(student.t.tolist()) == set(grid(3, 10.0)[1:].tolist())
    assert torch.equal(student.grid, grid(4, 10.0))
    x1 = (student.x_t - (1 - column(student.t)) * x) / column(student.t)
    assert x1.var() == pytest.approx(1, abs=0.1) and student.y1.var() == pytest.approx(1, abs=0.1)
    assert abs((x1 * student.y1).mean()) < 0.1, "y1 is fresh noise"
    printed = rollout_sample(student, x, text, seeded(), Stage2Config(m=3, n=4, x_hat="printed"))
    torch.testing.assert_close(printed, (x1 - 3).float(), rtol=1e-4, atol=1e-4)
    jump = Stage2Config(n=4, rollout=False)
    rollout_sample(student, x, text, seeded(), jump)
    assert student.grid.tolist() == [0.0, 0.999]
    direct: Any = Recorder("x")
    assert (rollout_sample(direct, x, text, seeded(), Stage2Config()) == 3).all()


# --- the method on a tiny Wan transformer


def tiny_method(**options: Any) -> tuple[TMDStage2, Batch]:
    teacher = tiny_transformer().requires_grad_(False)
    student = TMDStudent.from_teacher(teacher, h=2)
    x = torch.randn(3, *SHAPE, generator=seeded())
    text = torch.randn(3, TEXT_LENGTH, TEXT_WIDTH, generator=seeded(1))
    config = Stage2Config(**({"discriminator_width": 8, "discriminator_scales": (1, 2)} | options))
    return TMDStage2(student, teacher, torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH), config), Batch(latents=x, text=text)


def touched(network: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in network.parameters())


def test_turns() -> None:
    method, _ = tiny_method()
    turns = [method.turn(iteration) for iteration in range(1, 11)]
    assert turns == ([("fake_score", "discriminator")] * 4 + [("student",)]) * 2
    assert tiny_method(gan_weight=0.0)[0].turn(1) == ("fake_score",)
    assert tiny_method(student_every=2)[0].turn(2) == ("student",)


def test_student_turn_reaches_the_student_only() -> None:
    method, batch = tiny_method()
    terms = method.losses(batch, 5, seeded())
    assert set(terms) == {"vsd", "gan"} and all(term.ndim == 0 for term in terms.values())
    for name in terms:  # each term alone reaches the main backbone and the flow head
        method.student.zero_grad()
        terms[name].backward(retain_graph=True)
        for block in (method.student.backbone_blocks[0], method.student.head_blocks[-1]):
            assert block.attn1.to_q.weight.grad.abs().sum() > 0, name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())
    assert not touched(method.fake_score) and not touched(method.discriminator) and not touched(method.teacher)
    assert all(p.requires_grad for p in method.discriminator.parameters()), "frozen for the forward pass only"
    assert set(method.metrics()) == {"vsd_gradient", "logit_generated", "gate"}


def test_critic_turn_leaves_the_student_alone() -> None:
    method, batch = tiny_method()
    terms = method.losses(batch, 1, seeded())
    assert set(terms) == {"fake_score", "discriminator"}
    sum(terms.values()).backward()
    assert not touched(method.student) and not touched(method.teacher)
    assert all(p.grad is not None for p in method.discriminator.parameters())
    assert method.fake_score.proj_out.weight.grad.abs().sum() > 0
    assert set(method.metrics()) == {"logit_fake", "logit_real", "gate"}


def test_fake_score_starts_as_a_trainable_copy_of_the_teacher() -> None:
    method, _ = tiny_method()
    pairs = zip(method.fake_score.parameters(), method.teacher.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) and mine.requires_grad and not theirs.requires_grad for mine, theirs in pairs)
    assert method.fake_score.proj_out.weight.data_ptr() != method.teacher.proj_out.weight.data_ptr()


def test_vsd_term_by_hand() -> None:
    """At the start g_fake is the unguided teacher, so the gradient is -(w - 1) t (v_u - v_c) / norm: zero for w = 1."""
    method, batch = tiny_method(guidance=1.0)
    assert method.losses(batch, 5, seeded())["vsd"].item() == 0
    method, _ = tiny_method(guidance=5.0)
    term = method.losses(batch, 5, seeded())["vsd"]
    generator = seeded()  # the same draws again
    with torch.no_grad():
        x_hat = method.generate(batch.latents, batch.text, generator)
        t = sample_times(3, Shift(gamma=5.0), generator)
        x_t = interpolate(x_hat, draw_noise(x_hat, generator), t)
        v_c = velocity(method.teacher, x_t, t, batch.text)
        v_u = velocity(method.teacher, x_t, t, torch.zeros_like(batch.text))
        time = column(t).float()
        difference = 4 * time * (v_c - v_u)  # g_fake - g_teacher = -t (v_c - v_u - 5 (v_c - v_u))
        g_teacher = x_t - time * (v_u + 5 * (v_c - v_u))
        norm = (x_hat - g_teacher).abs().flatten(1).mean(dim=1).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(clean(x_t, t, guided(v_c, v_u, 5.0)), g_teacher, rtol=1e-4, atol=1e-5)
    assert term.item() == pytest.approx(0.5 * (difference / norm).square().mean().item(), rel=1e-4)


def test_real_and_fake_share_time_and_noise() -> None:
    """A student that returns the data cannot be told from it, whatever the draw: both logits are the same."""
    method, batch = tiny_method()
    method.generate = lambda x, text, generator: x
    method.losses(batch, 1, seeded())
    metrics = method.metrics()
    assert metrics["logit_fake"] == metrics["logit_real"] != 0


def test_gan_weight_and_r1() -> None:
    heavy, light = (tiny_method(gan_weight=weight) for weight in (1.0, 0.25))
    light[0].discriminator.load_state_dict(heavy[0].discriminator.state_dict())
    gans = [method.losses(batch, 5, seeded())["gan"].item() for method, batch in (heavy, light)]
    assert gans[0] == pytest.approx(4 * gans[1], rel=1e-5)
    none, batch = tiny_method(gan_weight=0.0)
    assert set(none.losses(batch, 5, seeded())) == {"vsd"} and set(none.losses(batch, 1, seeded())) == {"fake_score"}
    regular, batch = tiny_method(r1_weight=10.0)
    terms = regular.losses(batch, 1, seeded())
    assert terms["r1"].item() > 0
    terms["r1"].backward()
    assert touched(regular.discriminator) and not touched(regular.student)


def test_recomputed_activations_give_the_same_gradients() -> None:
    """Gradient checkpointing of the student and of the teacher, whose features are taken by hooks, changes nothing."""
    method, batch = tiny_method()
    gradients = []
    for recompute in (False, True):
        if recompute:
            method.student.enable_gradient_checkpointing()
            method.teacher.enable_gradient_checkpointing()
        method.student.zero_grad()
        sum(method.losses(batch, 5, seeded()).values()).backward()
        gradients.append([parameter.grad.clone() for parameter in method.student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_determinism() -> None:
    method, batch = tiny_method()
    for iteration in (1, 5):
        first, again, other = (method.losses(batch, iteration, seeded(seed)) for seed in (0, 0, 1))
        assert all(first[name] == again[name] != other[name] for name in first)


def test_frozen_restores_what_was_trainable() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError), frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        network(x).sum().backward()
        assert x.grad is not None and not touched(network)
        raise RuntimeError
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(("name", "offset", "share"), [("fake_score", 0.0, 0.94), ("discriminator", 3.0, 0.7)])
def test_critics_learn(name: str, offset: float, share: float) -> None:
    """30 updates: the fake score's error on the student falls; the discriminator tells it from data far off."""
    method, batch = tiny_method(gamma_dmd=1.0 if offset else 5.0)
    batch = replace(batch, latents=batch.latents + offset)
    optimiser = torch.optim.AdamW(method.networks[name].parameters(), lr=3e-3)

    def value() -> float:
        with torch.no_grad():
            return method.losses(batch, 1, seeded(99))[name].item()

    before, generator = value(), seeded(5)
    for _ in range(30):
        optimiser.zero_grad()
        method.losses(batch, 1, generator)[name].backward()
        optimiser.step()
    if name == "discriminator":
        assert before == pytest.approx(2 * math.log(2), abs=0.1), "an untrained head cannot tell"
    assert value() < share * before


def test_student_fools_a_fixed_discriminator() -> None:
    """Guidance 1 and an untrained fake score make VSD vanish at first, so the student follows the GAN."""
    method, batch = tiny_method(guidance=1.0, gan_weight=1.0)
    optimiser = torch.optim.AdamW(method.student.parameters(), lr=1e-3)

    def value() -> float:
        with torch.no_grad():
            return method.losses(batch, 5, seeded(99))["gan"].item()

    before, generator = value(), seeded(5)
    for _ in range(10):
        optimiser.zero_grad()
        method.losses(batch, 5, generator)["gan"].backward()
        optimiser.step()
    assert value() < before - 1e-3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"m": 0}, "0"),
        ({"n": 0}, "0"),
        ({"student_every": 1}, "student_every is 1"),
        ({"norm": "l2"}, "l2"),
        ({"x_hat": "theirs"}, "theirs"),
        ({"gan_weight": -1.0}, "gan_weight is -1"),
        ({"shift_dmd": "cosine"}, "cosine"),
        ({"gamma_dmd": -0.5}, "-0.5"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Stage2Config(**wrong)
