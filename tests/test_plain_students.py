"""Plain students: their record, their sampler against Eq. 18 and 19, and their checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from students.base import load_base, velocity
from students.checkpoint import BaseRecord, StudentSpec, load_student, open_checkpoint, save_student
from students.errors import ConfigError
from students.sampling import VideoNoise, sample_plain, sample_tmd
from students.text_kv import text_once
from students.times import grid
from students.tmd import TMDStudent
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_pipeline, tiny_transformer
from tmd_eval.nfe import measure_effective_nfe

SHAPE = (2, CHANNELS, 2, 4, 4)
RCM = (0.0, 0.60898, 0.85290, 0.93378, 80 / 81)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def spec_of(pipeline: Path, **changes: Any) -> StudentSpec:
    values: dict[str, Any] = dict(
        method="dmd2v", m=2, blocks=4, text_length=TEXT_LENGTH, base=BaseRecord.of(load_base(str(pipeline)))
    )
    return StudentSpec(**{**values, **changes})


class Draws:
    """Noise that remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self) -> Tensor:
        self.given.append(torch.randn(SHAPE, generator=torch.Generator().manual_seed(len(self.given))))
        return self.given[-1]


def inputs() -> tuple[WanTransformer3DModel, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        tiny_transformer(),
        torch.randn(2, 5, TEXT_WIDTH, generator=generator),
        torch.randn(SHAPE, generator=generator),
    )


@pytest.mark.parametrize("stochastic", [False, True])
def test_equal_to_diffusers_flow_match_euler(stochastic: bool) -> None:
    """Eq. 18 is Euler's step, Eq. 19 diffusers' stochastic sampling; both with our times as its sigmas."""
    transformer, text, noise = inputs()
    points = grid(3, 5.0)
    draws = Draws()
    ours = sample_plain(transformer, text, noise, points, "sde" if stochastic else "ode", draws)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=points.flip(0)[:-1].tolist())
    if stochastic:
        assert len(draws.given) == 2  # none is drawn for the last step
        supply = iter([*draws.given, torch.zeros(SHAPE)])
        scheduler_noise = pytest.MonkeyPatch()
        scheduler_noise.setattr(
            "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda *a, **k: next(supply)
        )
    x = noise
    with torch.no_grad():
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            v = velocity(transformer, x, sigma.expand(2), text)
            x = scheduler.step(v, t, x, return_dict=False)[0]
    if stochastic:
        scheduler_noise.undo()
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=0)


def test_scaled_start_rounded_times_and_guidance() -> None:
    transformer, text, noise = inputs()
    seen: list[float] = []
    handle = transformer.condition_embedder.register_forward_pre_hook(lambda m, a: seen.append(a[0][0].item()))
    points = torch.tensor(RCM, dtype=torch.float64)
    sample_plain(transformer, text, noise, points, "sde", Draws(), scaled=True, bf16_times=True)
    handle.remove()
    assert seen == [988.0, 932.0, 852.0, 608.0]  # what rCM's released code feeds its network in bf16
    one = torch.tensor([0, 0.9], dtype=torch.float64)
    half = sample_plain(transformer, text, noise, one, scaled=True)
    torch.testing.assert_close(half, sample_plain(transformer, text, 0.9 * noise, one))
    negative = torch.randn(1, 5, TEXT_WIDTH)
    both = sample_plain(transformer, text, noise, one, negative=negative, guidance=3.0)
    plain, bare = (sample_plain(transformer, t, noise, one) for t in (text, negative.expand(2, -1, -1)))
    torch.testing.assert_close(both, bare + 3 * (plain - bare), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="fresh_noise"):
        sample_plain(transformer, text, noise, one, "sde")
    with pytest.raises(ConfigError, match="negative"):
        sample_plain(transformer, text, noise, one, guidance=3.0)


def test_record_of_a_plain_student(pipeline: Path) -> None:
    spec = spec_of(pipeline)
    assert (spec.h, spec.n, spec.fusion, spec.target, spec.sampler, spec.inner_grid) == (None,) * 4 + ("ode", ())
    fixed = spec_of(pipeline, method="rcm", m=4, outer_grid=RCM, gamma_outer=None, sampler="sde")
    assert fixed.outer(2).tolist() == [0.0, *RCM[-2:]]  # rCM takes fewer steps from the noisy end
    with pytest.raises(ConfigError, match="fixed times of 4 steps"):
        fixed.outer(8)
    for changes, what in (
        (dict(n=2), "inner steps need a flow head"), (dict(sampler="tmd"), "sampler 'tmd'"),
        (dict(inner_grid=(0, 0.5)), "no inner steps"), (dict(gamma_outer=None), "neither is its shift"),
        (dict(guidance=0.5), "guidance is 0.5"), (dict(initial="half"), "initial 'half'"),
        (dict(h=1, n=1, guidance=2.0), "1 for TMD students"), (dict(h=1, n=1, sampler="ode"), "sampler 'ode'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            spec_of(pipeline, **changes)


def test_checkpoint_folder(pipeline: Path, tmp_path: Path) -> None:
    network = tiny_transformer((1, 1, 1), seed=5)
    spec = spec_of(pipeline, m=3, sampler="sde", gamma_outer=5.0)
    save_student(tmp_path / "student", network, spec)
    again, loaded = load_student(tmp_path / "student")
    assert again == spec and isinstance(loaded, WanTransformer3DModel) and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
    checkpoint = open_checkpoint(tmp_path / "student")
    settings = checkpoint.settings()
    assert (settings["m"], settings["n"], settings["h"], settings["effective_nfe"]) == (3, None, None, 3.0)
    assert settings["forward_passes"] == measure_effective_nfe(checkpoint) == 3.0  # CFG-free: one pass a step
    noise = VideoNoise([7], checkpoint.base.latent_shape)
    x1 = noise.draw()
    assert isinstance(checkpoint.student, WanTransformer3DModel)
    latents = sample_plain(
        checkpoint.student, checkpoint.base.encode_prompts(["a red circle"]), x1, grid(3, 5.0), "sde", noise.draw
    )
    assert torch.equal(checkpoint.sample(["a red circle"], [7]), checkpoint.base.decode(latents))
    for arguments in (dict(n=1), dict(guidance=3.0)):
        with pytest.raises(ConfigError):
            checkpoint.settings(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="L is 5, the network has 4"):
        save_student(tmp_path / "other", network, spec_of(pipeline, blocks=5))


def test_text_is_projected_once_per_outer_step() -> None:
    transformer, text, noise = inputs()
    torch.manual_seed(3)
    student = TMDStudent.from_teacher(transformer, h=2, gate=0.0).eval()
    calls = {"key": 0, "rope": 0}

    def count(name: str) -> Any:
        return lambda *a: calls.__setitem__(name, calls[name] + 1)

    student.head_blocks[0].attn2.to_k.register_forward_hook(count("key"))
    student.rope.register_forward_hook(count("rope"))
    once = sample_tmd(student, text, noise, grid(2, 10), grid(4, 10), Draws())
    assert calls == {"key": 2, "rope": 2}  # M = 2 outer steps, N = 4 inner steps each
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("students.sampling.text_once", lambda blocks: torch.no_grad())
        plain = sample_tmd(student, text, noise, grid(2, 10), grid(4, 10), Draws())
    assert calls["key"] == 2 + 8
    assert torch.equal(once, plain)
    block = student.head_blocks[0]
    before = block.attn2.processor
    with pytest.raises(RuntimeError), text_once([block]):
        assert block.attn2.processor is not before
        raise RuntimeError
    assert block.attn2.processor is before
