"""Samplers: the teacher's against WanPipeline, Algorithm 1 against closed forms, noise per video."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from students.base import Base, load_base
from students.errors import ConfigError
from students.sampling import VideoNoise, sample_teacher, sample_tmd
from students.times import grid
from students.tmd import TMDStudent
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_pipeline, tiny_transformer

PROMPTS = ["a red circle moves left", "a blue square moves up slowly on a dark background"]


@pytest.fixture(scope="module", params=[(1, 1, 1), (1, 2, 2)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=request.param)))


@pytest.mark.parametrize("steps, guidance", [(1, 3.0), (2, 1.0), (6, 3.0)])
def test_teacher_equals_the_pipeline(base: Base, steps: int, guidance: float) -> None:
    noise = VideoNoise([1, 2], base.latent_shape).draw()
    text, negative = base.encode_prompts(PROMPTS), base.encode_prompts(["dark"])
    ours = sample_teacher(base, text, negative, noise, steps, guidance)
    pipeline = WanPipeline.from_pretrained(base.folder)
    pipeline.set_progress_bar_config(disable=True)

    def run(length: int) -> Tensor:
        return pipeline(
            PROMPTS, negative_prompt="dark", height=32, width=32, num_frames=9, num_inference_steps=steps,
            guidance_scale=guidance, latents=noise, max_sequence_length=length, output_type="latent",
        ).frames  # fmt: skip

    torch.testing.assert_close(ours, run(base.text_length), atol=1e-5, rtol=0)
    assert (ours - run(base.text_length + 4)).abs().max() > 1e-4  # padding is attended to, so the length matters


def test_teacher_refuses_zero_steps_and_guidance_without_negative(base: Base) -> None:
    noise, text = torch.zeros(1, *base.latent_shape), torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH)
    with pytest.raises(ConfigError, match="not 0"):
        sample_teacher(base, text, None, noise, 0, 1.0)
    with pytest.raises(ConfigError, match="negative"):
        sample_teacher(base, text, None, noise, 2, 3.0)


class Posterior(TMDStudent):
    """Stands for a perfect student of a single datum x: it knows x1 - x = (x_t - x) / t and the target x."""

    def __init__(self, x: Tensor, target: str) -> None:
        torch.nn.Module.__init__(self)
        self.x, self.target, self.head_blocks = x, target, torch.nn.ModuleList()
        self.backbone_times: list[float] = []

    def backbone(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        self.backbone_times.append(t[0].item())
        return (x_t - self.x) / t.view(-1, 1, 1, 1, 1)  # the only y = x1 - x there is

    def head(self, y_s: Tensor, s: Tensor, r: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        return features


@pytest.mark.parametrize("target", ["x1-x", "x"])
@pytest.mark.parametrize("m, n", [(1, 1), (2, 2), (4, 3)])
def test_algorithm_1_reaches_the_datum(target: str, m: int, n: int) -> None:
    """With inner and outer grids up to 1 a perfect student lands on x exactly, whatever M, N and the inner noise."""
    x = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    student = Posterior(x, target)
    outer, inner = grid(m, 10, maximum=1.0), grid(n, 10, maximum=1.0)
    noise = torch.randn_like(x)
    out = sample_tmd(student, torch.zeros(2, 1, 1), noise, outer, inner, lambda: torch.randn(x.shape))
    torch.testing.assert_close(out, x, atol=1e-10, rtol=0)
    assert student.backbone_times == outer.tolist()[:0:-1]  # t_M, ..., t_1


@pytest.mark.parametrize("m, n", [(1, 1), (2, 2), (3, 4)])
def test_backbone_runs_m_times_and_head_m_n_times(m: int, n: int) -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=3).eval()
    counts = {"backbone": 0, "head": 0}
    student.backbone_blocks[0].register_forward_hook(lambda *_: counts.update(backbone=counts["backbone"] + 1))
    student.head_blocks[-1].register_forward_hook(lambda *_: counts.update(head=counts["head"] + 1))
    noise, draws = VideoNoise([3], (4, 3, 4, 4)), []

    def inner_noise() -> Tensor:
        draws.append(noise.draw())
        return draws[-1]

    sample_tmd(student, torch.randn(1, 5, TEXT_WIDTH), noise.draw(), grid(m, 10), grid(n, 10), inner_noise)
    assert counts == {"backbone": m, "head": m * n}
    assert len(draws) == m and len({d.sum().item() for d in draws}) == m  # fresh y1 at each outer step


def test_grids_are_checked() -> None:
    student = TMDStudent.from_teacher(tiny_transformer(), h=1).eval()
    x, text = torch.zeros(1, 4, 3, 4, 4), torch.zeros(1, 2, TEXT_WIDTH)
    good, bad = grid(2, 10), torch.tensor([0.0, 0.9, 0.5])
    for outer, inner in ((bad, good), (good, bad)):
        with pytest.raises(ConfigError, match="strictly increasing"):
            sample_tmd(student, text, x, outer, inner, lambda: x)


def test_noise_belongs_to_the_seed() -> None:
    together, alone = VideoNoise([5, 6, 7], (4, 3, 4, 4)), VideoNoise([6], (4, 3, 4, 4))
    first = together.draw()
    assert first.shape == (3, 4, 3, 4, 4) and first.dtype == torch.float32
    assert torch.equal(first[1], alone.draw()[0])
    second = together.draw()
    assert torch.equal(second[1], alone.draw()[0]) and not torch.equal(first, second)
    assert abs(torch.cat([first, second]).std().item() - 1) < 0.05
