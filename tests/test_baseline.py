"""The baseline DMD2-v: its steps and samples by hand, backward simulation, the KD warm-up, and the chain of both."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from students.base import clean, load_base, velocity
from students.checkpoint import load_student, open_checkpoint
from students.config import TrainConfig, resolve
from students.data import LatentShards, write_index, write_shard
from students.discriminator import make_discriminator
from students.distributed import Ranks
from students.dmd2v import PlainDMD2V, PlainDMD2VConfig, plain_sample
from students.errors import ConfigError
from students.kd import INDEX, KD, KDConfig, Trajectories, open_trajectories
from students.method import Batch, interpolate
from students.plain import NEXT_POINT, walk
from students.sampling import VideoNoise, sample_plain, sample_teacher
from students.settings import Layer
from students.times import grid
from students.train import train
from tests.tiny import CHANNELS, TEXT_LENGTH, TEXT_WIDTH, tiny_pipeline, tiny_transformer

SHAPE = (CHANNELS, 2, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1, 1)


# --- steps and samples


def test_steps_by_hand() -> None:
    x, noise = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    t, nearer = 0.8, 0.3
    x_t = (1 - t) * x + t * noise
    ode, sde = NEXT_POINT["ode"], NEXT_POINT["sde"]
    torch.testing.assert_close(ode(x_t, x, t, nearer, torch.empty), (1 - nearer) * x + nearer * noise)  # straight path
    assert torch.equal(ode(x_t, x, t, t, torch.empty), x_t)  # Eq. 18: stays at t_next = t, gives g at t_next = 0
    assert torch.equal(ode(x_t, x, t, 0.0, torch.empty), x)
    fresh = normal(2, *SHAPE, seed=2)
    torch.testing.assert_close(sde(x_t, x, t, nearer, lambda: fresh), 0.7 * x + 0.3 * fresh)  # Eq. 19
    assert torch.equal(sde(x_t, x, t, 0.0, torch.empty), x)


def test_x_hat_is_the_clean_estimate_of_noised_data() -> None:
    student, x, text = tiny_transformer(), normal(6, *SHAPE), normal(6, TEXT_LENGTH, TEXT_WIDTH)
    config = PlainDMD2VConfig(m=3)
    x_hat = plain_sample(student, x, text, seeded(), config)
    generator = seeded()  # the same draws again
    t = config.outer_times(6, generator)
    x_t = interpolate(x, torch.randn(x.shape, generator=generator), t)
    assert set(t.tolist()) <= set(grid(3, 10.0)[1:].tolist())
    torch.testing.assert_close(x_hat, clean(x_t, t, velocity(student, x_t, t, text)))
    assert x_hat.requires_grad


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_backward_simulation_is_the_students_own_sampling(sampler: Any) -> None:
    """At every t_i, x_hat is the clean estimate where the sampler stands; the data's values have no say."""
    student, text = tiny_transformer(), normal(2, TEXT_LENGTH, TEXT_WIDTH)
    config = PlainDMD2VConfig(m=3, sampler=sampler, backward_simulation=True)
    points, met = config.outer_grid(), set()
    for seed in range(6):
        x_hat = plain_sample(student, torch.zeros(2, *SHAPE), text, seeded(seed), config)
        other = plain_sample(student, torch.ones(2, *SHAPE), text, seeded(seed), config)
        assert torch.equal(x_hat, other)
        generator = seeded(seed)
        i = int(torch.randint(1, 4, (1,), generator=generator))
        noise = torch.randn(2, *SHAPE, generator=generator)
        # From t_i the rest of the grid is one jump to 0: the sampler on 0, t_i, ..., t_M ends in that x_hat.
        own = torch.cat([torch.zeros(1, dtype=torch.float64), points[i:]])
        made = sample_plain(
            student, text, noise, own, sampler, lambda: torch.randn(2, *SHAPE, generator=generator),  # noqa: B023
        )  # fmt: skip
        torch.testing.assert_close(x_hat.detach(), made, rtol=1e-4, atol=1e-5)
        met.add(i)
    assert met == {1, 2, 3}


def test_backward_simulation_of_ranks_that_gather_runs_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of a sharded student is a collective call, and ranks draw different numbers of steps."""
    from students import dmd2v

    config = PlainDMD2VConfig(m=3, backward_simulation=True)
    student, text, x = tiny_transformer(), normal(2, TEXT_LENGTH, TEXT_WIDTH), normal(2, *SHAPE)

    def passes(shared: bool) -> set[int]:
        monkeypatch.setattr(dmd2v, "together", lambda network: shared)
        counts = set()
        for seed in range(12):
            count: list[int] = []
            handle = student.register_forward_pre_hook(lambda *_, count=count: count.append(1))
            plain_sample(student, x, text, seeded(seed), config)
            handle.remove()
            counts.add(len(count))
        return counts

    assert passes(False) == {1, 2, 3} and passes(True) == {3}


def test_backward_simulation_has_a_gradient_through_its_last_step_only() -> None:
    student, text = tiny_transformer(), normal(1, TEXT_LENGTH, TEXT_WIDTH)
    seen: list[bool] = []
    student.blocks[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    config = PlainDMD2VConfig(m=3, backward_simulation=True)
    for seed in range(6):
        seen.clear()
        plain_sample(student, torch.zeros(1, *SHAPE), text, seeded(seed), config)
        assert seen == [False] * (len(seen) - 1) + [True]


def test_walk_of_one_point_stays() -> None:
    x = normal(1, *SHAPE)
    assert walk(tiny_transformer(), x, torch.empty(0), [0.9], "ode", torch.empty) is x


def test_gaussian_shift_of_the_students_times() -> None:
    config = PlainDMD2VConfig(m=2, shift_outer="gaussian", sigma_outer=0.1)
    assert config.outer_grid().tolist() == [0, 0.5, 0.999] and config.sampling_gamma == 1
    t = config.outer_times(20_000, seeded())
    assert t.min() >= 0.001 and t.max() <= 0.999
    low = t[t < 0.75] - 0.5  # N(0, 0.1^2) around the lower point, cut by nothing
    assert low.mean().abs() < 0.005 and abs(low.std().item() - 0.1) < 0.005
    assert abs((t == 0.999).double().mean() - 0.25) < 0.02, "half of those around 0.999 are beyond it"
    still = replace(config, sigma_outer=0.0).outer_times(100, seeded())
    assert set(still.tolist()) == {0.5, 0.999}


# --- discriminators


@pytest.mark.parametrize("kind", ["conv3d", "conv1d2d", "attention"])
def test_heads_judge_each_sample_by_all_of_it(kind: str) -> None:
    torch.manual_seed(0)
    discriminator = make_discriminator(kind, 16, 2, width=16, scales=(1, 2))
    maps = [normal(3, 16, 3, 10, 4, seed=i).requires_grad_() for i in (0, 1)]
    logits = discriminator(maps)
    assert logits.shape == (3, 2) and logits.dtype == torch.float32
    grads = torch.autograd.grad(logits[1, 1], maps)
    assert not grads[0].any() and not grads[1][0].any() and not grads[1][2].any()
    assert (grads[1][1].abs().amax(dim=0) > 0).all(), "every frame and place counts"
    torch.testing.assert_close(discriminator([m[1:2] for m in maps]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_factorised_convolutions_by_hand() -> None:
    """Per branch 9 w w + 3 w w and two biases instead of 27 w w and one."""
    w = 8
    sizes = {
        kind: sum(p.numel() for p in make_discriminator(kind, 12, 1, width=w, scales=(1,)).parameters())
        for kind in ("conv3d", "conv1d2d")
    }
    assert sizes["conv3d"] - sizes["conv1d2d"] == 27 * w * w + w - (12 * w * w + 2 * w)


def test_the_discriminator_is_a_choice() -> None:
    teacher = tiny_transformer().requires_grad_(False)
    negative = torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH)
    batch = Batch(latents=normal(2, *SHAPE), text=normal(2, TEXT_LENGTH, TEXT_WIDTH))
    for kind in ("conv3d", "conv1d2d", "attention", "none"):
        config = PlainDMD2VConfig(discriminator=kind, discriminator_width=8, r1_weight=0.5 * (kind != "none"))  # type: ignore[arg-type]
        method = PlainDMD2V(tiny_transformer(seed=1), teacher, negative, config)
        assert ("discriminator" in method.networks) == (kind != "none")
        assert set(method.losses(batch, 5, seeded())) == ({"vsd"} if kind == "none" else {"vsd", "gan"})
        critics = {"fake_score"} if kind == "none" else {"fake_score", "discriminator", "r1"}
        assert set(method.losses(batch, 1, seeded())) == critics
    with pytest.raises(ConfigError, match="choose one of conv3d, conv1d2d, attention, none"):
        PlainDMD2VConfig(discriminator="conv2d")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="choose one of ode, sde"):
        PlainDMD2VConfig(sampler="euler")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no discriminator to penalise"):
        PlainDMD2VConfig(discriminator="none", r1_weight=0.5)
    with pytest.raises(ConfigError, match="choose one of the two"):
        PlainDMD2VConfig(backward_simulation=True, shift_outer="gaussian")


# --- the KD warm-up


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=(1, 2, 2))
    base, folder = load_base(str(pipeline)), tmp_path_factory.mktemp("data")
    torch.manual_seed(1)
    text = base.encode_prompts(["a red circle moves left", "a blue square moves up on a dark background"])
    write_shard(folder, 0, torch.randn(6, *base.latent_shape), text.repeat(3, 1, 1))
    write_index(folder, base_hash=base.hash, source={})
    return {
        "base": str(pipeline), "data.kind": "shards", "data.folder": str(folder), "batch": 4, "device": "cpu",
        "iterations": 5, "optimiser.lr": 1e-3, "log_every": 1,
    }  # fmt: skip


def pairs_of(world: dict[str, Any]) -> tuple[Any, LatentShards]:
    base = load_base(world["base"])
    folder = Path(world["data.folder"])
    return base, LatentShards(folder, base_hash=base.hash, latent_shape=base.latent_shape, text_length=TEXT_LENGTH)


def test_trajectories_are_the_teachers_and_made_once(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pairs = pairs_of(world)
    monkeypatch.setattr("students.kd.VALUES", 2 * torch.Size(base.latent_shape).numel())  # two trajectories a shard
    config = KDConfig(trajectories=5, teacher_steps=4, skip=2, guidance=3.0, cache=str(tmp_path))
    shards = open_trajectories(config, base, pairs, Ranks("cpu"), False)
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3 and len(shards) == 5
    assert [load_file(path)["points"].shape[:2] for path in files] == [(2, 3), (2, 3), (1, 3)]
    everything = torch.cat([load_file(path)["points"] for path in files])
    text = torch.cat([pairs.draw(0, 1, 5, slice(i, i + 1)).text for i in range(5)])
    negative = base.encode_prompts([""])
    alone = sample_teacher(base, text[:2], negative, everything[:2, 0], 4, 3.0)
    torch.testing.assert_close(everything[:2, -1], alone)
    assert abs(everything[:, 0].std() - 1) < 0.1 and shards.times[0] == pytest.approx(0.999)
    assert shards.times.tolist() == sorted(shards.times.tolist(), reverse=True)

    batch = shards.draw(7, 1, 4, slice(0, 4))
    rest = shards.draw(7, 2, 4, slice(0, 1))  # the fifth of the first epoch
    rows = {tuple(row.flatten()[:3].tolist()) for row in (*batch.latents, *rest.latents)}
    assert len(rows) == 5 and batch.points.shape[1] == 2
    for k in range(4):  # a trajectory keeps its text
        i = next(i for i in range(5) if torch.equal(everything[i, -1], batch.latents[k]))
        assert torch.equal(batch.text[k], text[i])

    (folder / INDEX).unlink()
    files[1].unlink()  # an interrupted run: only what is missing is made again
    before = {path.name: path.stat().st_mtime_ns for path in (files[0], files[2])}
    content = everything[2:4]
    again = open_trajectories(config, base, pairs, Ranks("cpu"), False)
    assert {path.name: path.stat().st_mtime_ns for path in (files[0], files[2])} == before
    torch.testing.assert_close(load_file(files[1])["points"], content)
    assert again.hash == shards.hash
    assert shards.setup_seconds is not None and shards.setup_seconds > 0 and again.setup_seconds is not None
    monkeypatch.setattr("students.kd.sample_teacher", None)  # finished: the teacher does not run
    assert open_trajectories(config, base, pairs, Ranks("cpu"), False).hash == shards.hash
    with pytest.raises(TypeError):
        open_trajectories(replace(config, guidance=2.0), base, pairs, Ranks("cpu"), False)


def test_damaged_trajectories_and_another_negative_prompt(world: dict[str, Any], tmp_path: Path) -> None:
    base, pairs = pairs_of(world)
    config = KDConfig(trajectories=2, teacher_steps=2, skip=1, guidance=3.0, cache=str(tmp_path))
    open_trajectories(config, base, pairs, Ranks("cpu"), False)
    base.negative_prompt = "blurred"
    open_trajectories(config, base, pairs, Ranks("cpu"), False)
    folder, _ = sorted(tmp_path.iterdir())  # a text of its own is another set
    for folder in tmp_path.iterdir():
        (shard,) = folder.glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"or has a damaged one .*delete the folder"):
        open_trajectories(config, base, pairs, Ranks("cpu"), False)
    for folder in tmp_path.iterdir():
        (folder / INDEX).write_text("{}")
    with pytest.raises(ConfigError, match="is damaged; delete"):
        open_trajectories(config, base, pairs, Ranks("cpu"), False)


def test_two_runs_that_want_the_same_trajectories_make_them_once(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pairs = pairs_of(world)
    config = KDConfig(trajectories=4, teacher_steps=3, skip=3, guidance=1.0, cache=str(tmp_path))
    calls: list[int] = []
    whole = sample_teacher

    def slow(*arguments: Any, **named: Any) -> Tensor:
        calls.append(1)
        time.sleep(0.3)  # long enough for the other one to come along
        return whole(*arguments, **named)

    monkeypatch.setattr("students.kd.sample_teacher", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: open_trajectories(config, base, pairs, Ranks("cpu"), False), range(2))
    assert first.hash == second.hash and len(calls) == 1


def test_kd_loss_by_hand() -> None:
    student = tiny_transformer()
    points, ends = normal(8, 3, *SHAPE), normal(8, *SHAPE, seed=1)
    times = torch.tensor([0.999, 0.9, 0.6], dtype=torch.float64)
    text = normal(8, TEXT_LENGTH, TEXT_WIDTH)
    batch = Trajectories(latents=ends, text=text, points=points, times=times)
    one = KD(student, KDConfig(m=1)).losses(batch, 1, seeded())["kd"]
    g = clean(points[:, 0], times[:1].expand(8), velocity(student, points[:, 0], times[:1].expand(8), text))
    assert one.item() == pytest.approx(0.5 * (g - ends).square().mean().item(), rel=1e-5)
    # M = 2: the points nearest to 0.909 and 0.999; the third is never asked for.
    points[:, 2] = float("nan")
    assert KD(student, KDConfig(m=2)).losses(batch, 1, seeded(1))["kd"].isfinite()


def test_kd_settings() -> None:
    assert KDConfig().m == 1, "the warm-up is for one step only, unless asked"
    with pytest.raises(ConfigError, match="more than the 5 steps"):
        KDConfig(teacher_steps=5, skip=6)
    with pytest.raises(ConfigError, match="trajectories is 0"):
        KDConfig(trajectories=0)


# --- from a config to videos


def make(world: dict[str, Any], out: Path, **settings: Any) -> TrainConfig:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return resolve([Layer("test", {**world, "out": str(out), **named})])


def test_kd_then_dmd2v_then_videos(world: dict[str, Any], tmp_path: Path) -> None:
    common = {"method__m": 1, "method__guidance": 1.5}
    kd = make(
        world, tmp_path / "kd", method__name="kd", method__trajectories=4, method__teacher_steps=3, method__skip=3,
        method__cache=str(tmp_path / "cache"), **common,
    )  # fmt: skip
    warm = train(kd, progress=False)
    parent = {"parent": str(warm), "method__name": "dmd2v", **common}
    config = make(world, tmp_path / "dmd2v", student__h=3, method__sampler="sde", **parent)
    assert "student" not in config.tree(), "no flow head, no section about it"
    folder = train(config, progress=False)
    spec, student = load_student(folder)
    assert (spec.method, spec.m, spec.n, spec.h, spec.sampler) == ("dmd2-v", 1, None, None, "sde")
    start = load_student(warm)[1]
    moved = [not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True)]
    assert any(moved) and spec.training["parent"]["ref"] == str(warm)
    checkpoint = open_checkpoint(folder)
    video = checkpoint.sample(["a red circle moves left"], [3])
    noise = VideoNoise([3], checkpoint.base.latent_shape).draw()
    text = checkpoint.base.encode_prompts(["a red circle moves left"])
    t = torch.tensor([0.999], dtype=torch.float64)
    with torch.no_grad():
        made = clean(noise, t, velocity(student, noise, t, text))  # type: ignore[arg-type]
    assert (video.int() - checkpoint.base.decode(made).int()).abs().max() <= 1
    assert checkpoint.settings(m=4)["effective_nfe"] == 4
    # Resuming a finished run with the same config does nothing.
    stamp = (folder / "student.json").stat().st_mtime_ns
    train(config, resume=True, progress=False)
    assert (folder / "student.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="has no flow head, but the student of tm_mf has one"):
        train(make(world, tmp_path / "x", method__name="tm_mf", parent=str(folder), student__h=1), progress=False)


def test_interrupted_dmd2v_resumes_to_the_bit(world: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method__name": "dmd2v",
        "method__m": 2,
        "method__guidance": 1.0,
        "method__discriminator": "none",
    }
    whole = train(make(world, tmp_path / "a", iterations=5, **settings), progress=False)
    train(make(world, tmp_path / "b", iterations=3, **settings), progress=False)
    again = train(make(world, tmp_path / "b", iterations=5, **settings), resume=True, progress=False)
    first, second = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rates_grow_over_the_warm_up(world: dict[str, Any], tmp_path: Path) -> None:
    """Adam's first step has the size of the rate: after one iteration of a warm-up of 100, a hundredth of it."""
    settings: dict[str, Any] = {
        "method__name": "rcm", "method__guidance": 1.0, "method__dmd_weight": 0, "method__derivative": "finite",
        "iterations": 1, "ema": 0, "optimiser__weight_decay": 0,
    }  # fmt: skip
    start = load_base(world["base"]).transformer.proj_out.weight
    moved = []
    for warmup in (0, 100):
        folder = train(make(world, tmp_path / str(warmup), optimiser__warmup=warmup, **settings), progress=False)
        moved.append((load_student(folder)[1].proj_out.weight - start).abs().max().item())
    assert moved[0] == pytest.approx(1e-3, rel=0.01) and moved[1] == pytest.approx(1e-5, rel=0.05)


def test_every_network_warms_up_by_its_own_updates(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rCM: two iterations of the student, four of the critic, one of the student; stopped and resumed between."""
    settings: dict[str, Any] = {
        "method__name": "rcm", "method__guidance": 1.5, "method__tangent_warmup": 2, "method__derivative": "finite",
        "optimiser__warmup": 4, "optimiser__lr": 1e-3, "optimiser__lr_fake_score": 1e-2,
    }  # fmt: skip
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train(make(world, tmp_path / "run", iterations=4, **settings), progress=False)
    train(make(world, tmp_path / "run", iterations=7, **settings), resume=True, progress=False)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 0.75e-3])


def test_a_parent_of_other_steps_is_told(
    world: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"iterations": 1, "method__guidance": 1.0, "student__h": 2, "method__n": 2}
    first = train(make(world, tmp_path / "s1", method__name="tm_mf", method__m=2, **common), progress=False)
    second = {"method__name": "tmd_stage2", "parent": str(first), **common}
    train(make(world, tmp_path / "same", method__m=2, **second), progress=False)
    assert "was trained with" not in caplog.text
    train(make(world, tmp_path / "other", method__m=1, **second), progress=False)
    assert "was trained with m = 2, this run has 1" in caplog.text


def test_rcm_from_a_config_to_videos(world: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method__name": "rcm", "method__guidance": 1.5, "method__tangent_warmup": 2}
    folder = train(make(world, tmp_path / "rcm", iterations=7, optimiser__warmup=4, **settings), progress=False)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec is not None and checkpoint.spec.method == "rcm"
    for m in (1, 2, 4):
        assert checkpoint.settings(m=m)["effective_nfe"] == m
        assert checkpoint.sample(["a red circle moves left"], [0], m=m).shape[0] == 1
    with pytest.raises(ConfigError, match="it cannot take 5"):
        checkpoint.settings(m=5)
    log = [json.loads(line) for line in (tmp_path / "rcm" / "events.jsonl").read_text().splitlines()]
    assert [set(row) & {"loss/scm", "loss/dmd", "loss/fake_score"} for row in log] == (
        [{"loss/scm"}] * 2 + [{"loss/fake_score"}] * 4 + [{"loss/scm", "loss/dmd"}]
    )
