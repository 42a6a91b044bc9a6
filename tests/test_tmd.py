"""The TMD student: equal to its teacher at the start, its inner flow in closed form, its gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from students.base import velocity
from students.errors import ConfigError
from students.times import grid
from students.tmd import Features, TMDStudent, unpatchify
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_transformer

SHAPE = (CHANNELS, 3, 4, 4)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, *SHAPE, generator=generator)
    return (
        x,
        torch.linspace(0.31, 0.93, batch, dtype=torch.float64),
        torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH, generator=generator),
    )


def shut(student: TMDStudent) -> TMDStudent:
    """The student with its random fusion switched off."""
    with torch.no_grad():
        if student.fuse.gate is not None:
            student.fuse.gate.fill_(-torch.inf)
        else:
            student.fuse.mix.weight[:, student.fuse.mix.out_features :] = 0
    return student.eval()


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("fusion", ["gated", "concat"])
@pytest.mark.parametrize("h", [1, 3])
def test_student_equals_teacher_at_the_start(patch: tuple[int, int, int], fusion: str, h: int) -> None:
    teacher = tiny_transformer(patch)
    student = shut(TMDStudent.from_teacher(teacher, h=h, fusion=fusion))
    x, t, text = inputs()
    with torch.no_grad():
        expected = teacher(x, 1000 * t, text, return_dict=False)[0]  # not through our own velocity()
        y_s = torch.randn(x.shape)
        for r in (t, t * 0.3, torch.zeros_like(t)):
            torch.testing.assert_close(
                student.head(y_s, t, r, student.backbone(x, t, text)), expected, atol=1e-5, rtol=0
            )
    assert expected.std() > 0.1  # the comparison is not between zeros


def test_fusion_interval_and_head_time_matter_once_open() -> None:
    """What the parity test switches off does act: y_s through the fusion, s, and s - r once its last layer moves."""
    x, t, text = inputs()
    for fusion in ("gated", "concat"):
        student = TMDStudent.from_teacher(tiny_transformer(), h=2, fusion=fusion, gate=0.0).eval()
        with torch.no_grad():
            m = student.backbone(x, t, text)
            out = student.head(x, t, t * 0.5, m)
            assert (student.head(-x, t, t * 0.5, m) - out).abs().max() > 1e-3
            assert (student.head(x, t * 0.9, t * 0.4, m) - out).abs().max() > 1e-3
            assert torch.equal(student.head(x, t, t * 0.1, m), out)  # zero-initialised embedding of s - r
            student.interval_embedder.linear_2.weight.normal_()
            assert (student.head(x, t, t * 0.1, m) - student.head(x, t, t * 0.5, m)).abs().max() > 1e-3


def test_fusion_of_y_s_is_conditioned_on_s_only() -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=2, gate=0.0).eval()
    seen: list[Tensor] = []
    student.fuse.register_forward_hook(lambda module, arguments, output: seen.append(output))
    x, t, text = inputs()
    with torch.no_grad():
        student.interval_embedder.linear_2.weight.normal_()
        m = student.backbone(x, t, text)
        for r in (t, t * 0.2):
            student.head(x, t, r, m)
    assert torch.equal(*seen)


def test_interval_reaches_the_output_norm_too() -> None:
    """With the projection into the blocks cut, s - r can act through the output norm only."""
    student = shut(TMDStudent.from_teacher(tiny_transformer(), h=2))
    x, t, text = inputs()
    with torch.no_grad():
        student.interval_embedder.linear_2.weight.normal_()
        student.condition_embedder.time_proj.weight.zero_()
        m = student.backbone(x, t, text)
        assert (student.head(x, t, t * 0.1, m) - student.head(x, t, t * 0.9, m)).abs().max() > 1e-3


def test_fusion_block_is_adaptive_norm_mlp_and_gated_residual() -> None:
    """Re-uses the MLP's part (rows 3 to 5) of the global six-fold modulation: shift, scale, gate."""
    block = TMDStudent.from_teacher(tiny_transformer(), h=2).fuse.block
    y, modulation = torch.randn(2, 5, 24), torch.randn(2, 6, 24)
    shift, scale, gate = (block.scale_shift_table[0, i] + modulation[:, 3 + i, None] for i in range(3))
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(block(y, modulation), y + gate * block.ffn(normed * (1 + scale) + shift))


def test_gate_opens_as_its_sigmoid() -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=2).eval()
    assert student.gate_parameter is not None and student.gate_parameter.item() == -3
    m, y, modulation = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.randn(2, 6, 24)
    with torch.no_grad():
        f = student.fuse.block(y, modulation)
        share = 1 / (1 + torch.e**3)
        torch.testing.assert_close(student.fuse(m, y, modulation), (1 - share) * m + share * f)
    assert TMDStudent.from_teacher(tiny_transformer(), h=2, fusion="concat").gate_parameter is None


def test_concat_starts_at_identity_plus_small_noise() -> None:
    mix = TMDStudent.from_teacher(tiny_transformer(), h=2, fusion="concat").fuse.mix
    assert mix is not None and torch.equal(mix.weight[:, :24], torch.eye(24)) and not mix.bias.any()
    assert mix.weight[:, 24:].std().item() == pytest.approx(0.01, rel=0.2)


def test_unpatchify_inverts_cutting_into_patches() -> None:
    volume, (a, b, c) = torch.arange(2 * 3 * 4 * 4 * 6).view(2, 3, 4, 4, 6), (2, 1, 3)
    tokens = [
        volume[:, :, i : i + a, j : j + b, k : k + c].permute(0, 2, 3, 4, 1).flatten(1)  # patch first, then channels
        for i in range(0, 4, a)
        for j in range(0, 4, b)
        for k in range(0, 6, c)
    ]
    assert torch.equal(unpatchify(torch.stack(tokens, 1), (4, 4, 6), (a, b, c)), volume)


class Analytic(TMDStudent):
    """A student whose head is a known function of (y_s, s); the inner flow around it is the real one."""

    def __init__(self, head: object, target: str) -> None:
        torch.nn.Module.__init__(self)
        self.known, self.target = head, target

    def head(self, y_s: Tensor, s: Tensor, r: Tensor, features: Features) -> Tensor:
        return self.known(y_s, s, r)  # type: ignore[operator]


NO_FEATURES = Features(torch.empty(0), (torch.empty(0), torch.empty(0)), torch.empty(0))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_constant_velocity_maps_noise_to_data(n: int) -> None:
    """With one datum y the inner path is straight, u = y1 - y: any N lands on y, up to the 0.001 y1 past s_N = 0.999.

    With the plus sign that the paper's Eq. 13 prints, the flow would end at about 2 y1 - y instead.
    """
    y, y1 = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    student = Analytic(lambda y_s, s, r: y, "x1-x")
    out = student.rollout(NO_FEATURES, y1, grid(n, 10))
    torch.testing.assert_close(out, 0.999 * y + 0.001 * y1, atol=1e-12, rtol=0)
    full = student.rollout(NO_FEATURES, y1, torch.linspace(0, 1, n + 1, dtype=torch.float64))
    torch.testing.assert_close(full, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("target", ["x1-x", "x"])
def test_linear_velocity_follows_its_exact_solution(n: int, target: str) -> None:
    """For dy/ds = k y exactly u = y_s (1 - exp(-k (s - r))) / (s - r), and y_0 = y1 exp(-k s_N)."""
    k, s_n = 1.7, 0.999
    x_t, t = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([0.4, 0.8], dtype=torch.float64)
    y1 = torch.randn(2, *SHAPE, dtype=torch.float64)

    def column(time: Tensor) -> Tensor:
        return time.view(-1, 1, 1, 1, 1)

    def head(y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
        u = y_s * (1 - torch.exp(-k * column(s - r))) / column(s - r)
        if target == "x1-x":
            return y1 - u  # Eq. 14 solved for the head
        return (x_t - (y_s - column(s) * u)) / column(t)  # u = (y_s - (x_t - t head)) / s solved for the head

    out = Analytic(head, target).rollout(NO_FEATURES, y1, grid(n, 10), x_t=x_t, t=t)
    torch.testing.assert_close(out, y1 * torch.e ** (-k * s_n), atol=1e-10, rtol=0)


def test_target_x_needs_the_outer_sample() -> None:
    student = Analytic(lambda y_s, s, r: y_s, "x")
    with pytest.raises(ValueError, match="x_t and t"):
        student.rollout(NO_FEATURES, torch.randn(1, *SHAPE), grid(2, 10))


def test_rollout_refuses_a_grid_that_turns_back() -> None:
    student = Analytic(lambda y_s, s, r: y_s, "x1-x")
    with pytest.raises(ConfigError, match="strictly increasing"):
        student.rollout(NO_FEATURES, torch.randn(1, *SHAPE), torch.tensor([0.0, 0.9, 0.5]))


def test_gaussian_case_tells_the_two_forms_of_eq_15_apart() -> None:
    """x ~ N(0, 1), t = 10/11 (shift 10, M = 2): x1 - x given x_t is Gaussian, with the moments worked out below.

    Cov(x1 - x, x_t) = t - (1 - t) = 2t - 1; Var x_t = q = t^2 + (1 - t)^2; Var(x1 - x) = 2.
    A fresh y has the posterior mean (2t - 1) x_t / q and variance 2 - (2t - 1)^2 / q = 1 / q.
    Then Var(x_t - t y) = 1, since x_t - t y is distributed as x; but x1 and y share x_t only, so
    Var(x1 - y) = 1 + 2 - 2 Cov(x1, y) with Cov(x1, y) = (t / q) (2t - 1).
    """
    t = grid(2, 10)[1].item()
    q = t * t + (1 - t) ** 2
    n, generator = 400_000, torch.Generator().manual_seed(3)
    x, x1, y1 = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    x_t = (1 - t) * x + t * x1
    mean, deviation = (2 * t - 1) * x_t / q, q**-0.5

    def head(y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """y1 - u of the inner flow's exact map, which keeps z in N((1 - s) mean, ((1 - s) deviation)^2 + s^2)."""
        s, r = s.view(-1, 1, 1, 1, 1), r.view(-1, 1, 1, 1, 1)
        m = mean.view(y_s.shape)

        def scale(time: Tensor) -> Tensor:
            return (((1 - time) * deviation) ** 2 + time**2).sqrt()

        y_r = (1 - r) * m + scale(r) * (y_s - (1 - s) * m) / scale(s)
        return y1.view(y_s.shape) - (y_s - y_r) / (s - r)

    volume = y1.view(1, 1, 1, 1, n)
    y = Analytic(head, "x1-x").rollout(NO_FEATURES, volume, torch.tensor([0, 0.6, 1], dtype=torch.float64)).view(n)
    assert y.var().item() == pytest.approx(2, abs=0.02)  # the flow samples the posterior of x1 - x
    assert (x_t - t * y).var().item() == pytest.approx(1, abs=0.01)
    printed = 3 - 2 * t * (2 * t - 1) / q
    assert printed == pytest.approx(1.22, abs=0.005)
    assert (x1 - y).var().item() == pytest.approx(printed, abs=0.01)


@pytest.mark.parametrize("target", ["x1-x", "x"])
@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_gradients_of_the_rollout_reach_everything(fusion: str, target: str) -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=2, fusion=fusion, target=target)
    x, t, text = inputs()
    student.rollout(
        student.backbone(x, t, text), torch.randn(x.shape), grid(2, 10), x_t=x, t=t
    ).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        # the zero last layer of the (s - r) embedder hides what lies before it, for the first step
        if not name.startswith("interval_embedder.linear_1"):
            assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = TMDStudent.from_teacher(tiny_transformer(), h=2)
    saving = copy.deepcopy(plain)
    saving.enable_gradient_checkpointing()
    assert saving.gradient_checkpointing
    x, t, text = inputs()
    y1 = torch.randn(x.shape)
    runs = {False: 0, True: 0}
    for student in (plain, saving):
        student.head_blocks[0].attn1.register_forward_hook(
            lambda *_, key=student is saving: runs.__setitem__(key, runs[key] + 1)
        )
        student.rollout(student.backbone(x, t, text), y1, grid(2, 10)).square().mean().backward()
    assert runs == {False: 2, True: 4}  # run once more in the backward pass
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_text_is_projected_once_per_outer_step() -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=2).eval()
    runs = []
    student.condition_embedder.text_embedder.register_forward_hook(lambda *_: runs.append(1))
    x, t, text = inputs()
    with torch.no_grad():
        student.rollout(student.backbone(x, t, text), x, grid(4, 10))
    assert len(runs) == 1


def test_times_are_not_rounded_before_the_network() -> None:
    """s - r far below float32's resolution at 1 still reaches its embedder."""
    student = TMDStudent.from_teacher(tiny_transformer(), h=1).eval()
    seen: list[Tensor] = []
    student.condition_embedder.timesteps_proj.register_forward_hook(
        lambda m, arguments, output: seen.append(*arguments)
    )
    x, t, text = inputs(1)
    s = torch.tensor([0.9], dtype=torch.float64)
    with torch.no_grad():
        student.head(x, s, s - 1e-9, student.backbone(x, t, text))
    assert seen[-1].item() == pytest.approx(1e-6, rel=1e-4)


def test_copies_are_deep_and_trainable() -> None:
    teacher = tiny_transformer().requires_grad_(False)
    student = TMDStudent.from_teacher(teacher, h=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert student.blocks == 4 and len(student.head_blocks) == 2


@pytest.mark.parametrize("fusion, target", [("gated", "x"), ("concat", "x1-x")])
def test_save_and_load_round_trip(tmp_path: Path, fusion: str, target: str) -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=3, fusion=fusion, target=target, gate=-1.5).eval()
    student.save_pretrained(tmp_path)
    loaded = TMDStudent.from_pretrained(tmp_path).eval()
    x, t, text = inputs()
    with torch.no_grad():
        expected = student.rollout(student.backbone(x, t, text), x, grid(2, 10), x_t=x, t=t)
        assert torch.equal(loaded.rollout(loaded.backbone(x, t, text), x, grid(2, 10), x_t=x, t=t), expected)
    assert (loaded.h, loaded.target, loaded.config.fusion) == (3, target, fusion)


def test_half_precision_keeps_delicate_parts_in_float32(tmp_path: Path) -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=2).eval()
    student.save_pretrained(tmp_path)
    half = TMDStudent.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    for name in ("fuse.gate", "scale_shift_table", "fuse.block.scale_shift_table", "interval_embedder.linear_2.weight",
                 "condition_embedder.time_embedder.linear_1.weight", "backbone_blocks.0.norm2.weight"):  # fmt: skip
        assert kinds[name] == torch.float32, name
    assert kinds["head_blocks.0.attn1.to_q.weight"] == torch.bfloat16
    x, t, text = inputs()
    with torch.no_grad():
        full = student.rollout(student.backbone(x, t, text), x, grid(2, 10))
        out = half.rollout(half.backbone(x, t, text), x, grid(2, 10))
    assert out.dtype == torch.float32  # the samples stay in full precision
    torch.testing.assert_close(out, full, atol=0.1, rtol=0)


@pytest.mark.parametrize("h", [0, -1, 4, 5])
def test_wrong_h_is_refused_with_its_value(h: int) -> None:
    with pytest.raises(ConfigError, match=f"H is {h}; the flow head needs 1 to 3 of the 4 blocks"):
        TMDStudent.from_teacher(tiny_transformer(), h=h)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="fusion 'add'"):
        TMDStudent.from_teacher(tiny_transformer(), h=2, fusion="add")
    with pytest.raises(ConfigError, match="target 'v'"):
        TMDStudent.from_teacher(tiny_transformer(), h=2, target="v")


def test_velocity_passes_a_thousand_times_t() -> None:
    teacher = tiny_transformer()
    x, t, text = inputs()
    with torch.no_grad():
        expected = teacher(x, torch.tensor([310.0, 930.0]), text).sample
        torch.testing.assert_close(velocity(teacher, x, t, text), expected, atol=1e-6, rtol=0)
