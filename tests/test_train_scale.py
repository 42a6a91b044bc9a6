"""What large runs need of the trainer, in one process: shards read ahead, previews, logs, states, restarts, bf16."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from students.base import Base, load_base
from students.build import build_parts
from students.distributed import Ranks
from students.errors import ConfigError, EnvironmentMissingError
from students.parallel import embed_time_in_full, store_low
from students.preview import main_directions
from students.run_folder import resume_command
from students.tar_shards import Sample, TarShards, pack
from students.train import train
from students.trainer_state import MetricLog
from tests.test_train import STAGE2, events, make, weights, world
from tests.tiny import tiny_transformer
from tmd_eval.shards import Plan, make_shards

__all__ = ["world"]  # the fixture


@pytest.fixture(scope="module")
def tars(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine random pairs in three webdataset shards."""
    base = load_base(world["base"])
    captions = base.encode_prompts(["a red circle", "a blue square moves up on a dark background"])

    def pairs(items: list[int]) -> list[Sample | str]:
        drawn = [torch.randn(base.latent_shape, generator=torch.Generator().manual_seed(i)) for i in items]
        return [pack(latents, captions[i % 2], {}, torch.float16) for i, latents in zip(items, drawn, strict=True)]

    folder = tmp_path_factory.mktemp("tars") / "data"
    plan = Plan(folder=folder, source={}, items=range(9), shard_size=3, batch_size=3)
    make_shards(plan, pairs, base, verify=False, progress=False)
    return folder


def test_training_reads_ahead_and_loads_no_text_encoder(
    world: dict[str, Any], tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted or not, each pass gets its own pairs, and all but the first are read by the other thread."""
    monkeypatch.setattr(Base, "encode_prompts", lambda self, prompts: pytest.fail("a text encoder was loaded"))
    drawn: list[tuple[int, slice]] = []
    draw = TarShards.draw

    def noting(self: TarShards, seed: int, iteration: int, batch: int, part: slice) -> Any:
        drawn.append((iteration, part))
        return draw(self, seed, iteration, batch, part)

    monkeypatch.setattr(TarShards, "draw", noting)
    settings = {"data__folder": str(tars), "iterations": 3, "micro_batch": 2, "save_every": 1}
    train(make(world, tmp_path / "whole", **settings), progress=False)
    passes = [(i, slice(k, k + 2)) for i in (1, 2, 3) for k in (0, 2)]
    assert drawn[: len(passes)] == passes and len(drawn) <= len(passes) + 1  # at most one for the iteration to come
    train(make(world, tmp_path / "parts", **{**settings, "iterations": 1}), progress=False)
    train(make(world, tmp_path / "parts", **settings), resume=True, progress=False)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert not any("data/broken" in line for line in events(tmp_path / "whole"))


def test_broken_samples_are_counted_in_the_log(world: dict[str, Any], tars: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tars.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for index in range(2):  # six of nine
        for start, size, _ in json.loads((folder / f"{index:05d}.json").read_text())["samples"]:
            with (folder / f"{index:05d}.tar").open("r+b") as file:
                file.seek(start + size - 1)
                file.write(b"\x7f")
    train(make(world, tmp_path / "run", data__folder=str(folder), iterations=3), progress=False)
    counts = [line["data/broken"] for line in events(tmp_path / "run")]
    assert (
        counts == sorted(counts) and counts[-1] == 6 and all(np.isfinite(e["loss"]) for e in events(tmp_path / "run"))
    )


@pytest.mark.parametrize("decode", [True, False])
def test_previews_show_samples_and_change_nothing(world: dict[str, Any], tmp_path: Path, decode: bool) -> None:
    train(make(world, tmp_path / "plain"), progress=False)
    config = make(world, tmp_path / "shown", preview__every=1, preview__count=2, preview__decode=decode)
    train(config, progress=False)
    assert weights(tmp_path / "shown") == weights(tmp_path / "plain")
    sheets = sorted((tmp_path / "shown" / "previews").iterdir())
    assert [path.name for path in sheets] == ["00000001.png", "00000002.png"]
    pixels = [np.asarray(Image.open(path)) for path in sheets]
    height, width, columns = (32, 32, 4) if decode else (4, 4, 4)
    assert {p.shape for p in pixels} == {(2 * height, 2 * columns * width, 3)}
    left, right = np.split(np.stack(pixels), 2, axis=2)
    assert np.array_equal(left[0], left[1]) and not np.array_equal(left[0], right[0])  # the data stay, the samples move
    assert not np.array_equal(right[0], right[1])
    with pytest.raises(ConfigError, match=r"preview\.every must be at least 1, not 0"):
        make(world, tmp_path, preview__every=0)


def test_main_directions_find_the_latents_of_largest_spread() -> None:
    torch.manual_seed(0)
    real = torch.randn(2, 5, 3, 4, 4) * torch.tensor([0.1, 5.0, 0.1, 3.0, 1.0]).view(1, -1, 1, 1, 1)
    colours, again = main_directions(real, real)
    assert colours.shape == (2, 3, 4, 4, 3) and torch.equal(colours, again)
    flat = real.transpose(0, 1).flatten(1)
    found = torch.corrcoef(torch.cat([flat, colours.permute(4, 0, 1, 2, 3).flatten(1).float()]))[:5, 5:].abs()
    assert found.argmax(dim=0).tolist() == [1, 3, 4] and found.amax(dim=0).min() > 0.9


def test_states_at_multiples_are_kept(world: dict[str, Any], tmp_path: Path) -> None:
    train(make(world, tmp_path / "run", iterations=5, save_every=1, keep=1, keep_every=2), progress=False)
    names = sorted(path.name for path in (tmp_path / "run" / "state").iterdir())
    assert names == ["00000002.pt", "00000004.pt", "00000005.pt"]


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_command_goes_on(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train(make(world, tmp_path / "run", iterations=1), progress=False)
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match="is not empty"):
        train(make(world, tmp_path / "run"), progress=False)
    monkeypatch.setenv(name, "1")
    train(make(world, tmp_path / "run"), progress=False)
    assert [line["iteration"] for line in events(tmp_path / "run")] == [1, 2]


def test_the_way_to_go_on_names_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    out = Path("runs/x")
    assert resume_command(out, 16).startswith("torchrun --nnodes 2 --nproc-per-node 8 -m students.train runs/x/")
    assert resume_command(out, 8).startswith("torchrun --nproc-per-node 8 -m")


def test_wandb_gets_the_metrics_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append(("finish",))
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: calls.append((settings,)) or run  # type: ignore[attr-defined]
    fake.Image = lambda path: Path(path).name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricLog(tmp_path, after=0, wandb="students")
    log.add({"loss": 2.0})
    log.write(1, 0.5)
    log.image(np.zeros((8, 8, 3), np.uint8), 1)
    log.close()
    settings = calls[0][0]
    assert (settings["project"], settings["name"], settings["resume"]) == ("students", tmp_path.name, "allow")
    assert calls[1:] == [({"loss": 2.0}, 1), ({"preview": "00000001.png"}, 1), ("finish",)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        EnvironmentMissingError, match="wandb is students, but the package is not installed: pip install"
    ):
        MetricLog(tmp_path, after=0, wandb="students")


def test_wandb_that_is_not_installed_stops_a_run_before_it_writes(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentMissingError, match="pip install wandb"):
        train(make(world, tmp_path / "run", wandb="students"), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_could_not_begin_leaves_its_folder_free(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="H is 4"):
        train(make(world, tmp_path / "run", student__h=4), progress=False)
    assert not (tmp_path / "run").exists()
    train(make(world, tmp_path / "run"), progress=False)  # mended: the same folder, no --resume
    assert len(events(tmp_path / "run")) == 2


def test_bf16_runs_keep_what_diffusers_keeps(world: dict[str, Any], tmp_path: Path) -> None:
    """The frozen teacher is stored as from_pretrained stores it in bf16; fake score and student start from float32."""
    config = make(world, tmp_path, STAGE2, precision="bf16")
    parts = build_parts(config, Ranks("cpu"), progress=False)
    stored = load_base(world["base"], dtype=torch.bfloat16).transformer.state_dict()
    exact = load_base(world["base"]).transformer.state_dict()
    for name, tensor in parts.method.teacher.state_dict().items():  # type: ignore[attr-defined]
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in parts.method.networks["fake_score"].state_dict().items():
        assert torch.equal(tensor, exact[name]), name
    assert torch.equal(parts.student.patch_embedding.weight, exact["patch_embedding.weight"])  # type: ignore[union-attr]


def test_time_is_embedded_in_float32_under_autocast() -> None:
    network = tiny_transformer()
    x, t = torch.randn(1, 4, 3, 4, 4), torch.tensor([987.654], dtype=torch.float64)
    text = torch.randn(1, 5, 16)
    expected = network.condition_embedder.time_embedder(network.condition_embedder.timesteps_proj(t).float())
    seen: list[torch.Tensor] = []
    network.condition_embedder.time_embedder.register_forward_hook(lambda m, i, out: seen.append(out))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            network(x, t, text)
        embed_time_in_full(network, torch.device("cpu"))
    assert seen[0].dtype == torch.bfloat16
    assert seen[1].dtype == torch.float32 and torch.equal(seen[1], expected.detach())
    store_low(network)
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
