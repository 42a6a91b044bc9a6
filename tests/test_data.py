"""Training data: what is encoded, how it is cached, and that draws depend on the iteration alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from students import data
from students.base import Base, load_base
from students.data import DataConfig, LatentShards, micro_folder, stream_seed, write_index, write_shard
from students.errors import ConfigError
from students.micro.world import FRAMES, SIZE, is_held_out, make_clip
from tests.tiny import tiny_pipeline

SHAPE = (2, 3, 4, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny random model of the micro world's clips."""
    folder = tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    facts = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps({**facts, "frames": FRAMES, "height": SIZE, "width": SIZE}))
    return load_base(str(folder))


def shards(folder: Path, counts: tuple[int, ...] = (3, 4), length: int = 5) -> Path:
    """Shards whose item number i has latents filled with i and text filled with -i."""
    start = 0
    for index, count in enumerate(counts):
        numbers = torch.arange(start, start + count, dtype=torch.float32)
        latents = numbers.view(-1, 1, 1, 1, 1).expand(count, *SHAPE).contiguous()
        write_shard(folder, index, latents, -numbers.view(-1, 1, 1).expand(count, length, 6).contiguous())
        start += count
    write_index(folder, base_hash="b" * 64, source={})
    return folder


def open_shards(folder: Path, base_hash: str = "b" * 64, length: int = 5) -> LatentShards:
    return LatentShards(folder, base_hash=base_hash, latent_shape=SHAPE, text_length=length)


def numbers(batch: data.Batch) -> list[int]:
    values = batch.latents.flatten(1)
    assert (values == values[:, :1]).all() and torch.equal(batch.text[:, 0, 0], -values[:, 0])
    return values[:, 0].int().tolist()


def test_items_cross_shards_and_text_is_padded(tmp_path: Path) -> None:
    loader = open_shards(shards(tmp_path), length=8)
    assert len(loader) == 7
    batch = loader.items([6, 0, 3, 2])
    assert numbers(batch) == [6, 0, 3, 2]
    assert batch.text.shape == (4, 8, 6) and (batch.text[:, 5:] == 0).all() and (batch.text[0, :5] == -6).all()


def test_every_epoch_holds_each_item_once_in_another_order(tmp_path: Path) -> None:
    loader = open_shards(shards(tmp_path))
    seen = [n for i in range(1, 8) for n in numbers(loader.draw(3, i, 4, slice(0, 4)))]  # 28 draws: four epochs of 7
    epochs = [seen[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = [n for i in range(1, 8) for n in numbers(loader.draw(4, i, 4, slice(0, 4)))]
    assert other != seen


def test_draws_depend_on_nothing_but_seed_and_iteration(tmp_path: Path) -> None:
    """Any order of calls, a fresh loader, and any cut of the batch give the same items."""
    loader = open_shards(shards(tmp_path))
    whole = {i: numbers(loader.draw(0, i, 4, slice(0, 4))) for i in (5, 1, 9)}
    fresh = open_shards(tmp_path)
    for i in (9, 1, 5):
        assert numbers(fresh.draw(0, i, 4, slice(0, 2))) + numbers(fresh.draw(0, i, 4, slice(2, 4))) == whole[i]


def test_seeds_of_streams_differ() -> None:
    keys = [(0, "pass", i, k) for i in range(50) for k in range(4)] + [(1, "pass", 0, 0), (0, "epoch", 0)]
    seeds = {stream_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    good = shards(tmp_path / "good")
    with pytest.raises(ConfigError, match="does not exist"):
        open_shards(tmp_path / "none")
    with pytest.raises(ConfigError, match="base model bbbbbbbbbbbb, but the run's base model is cccccccccccc"):
        open_shards(good, base_hash="c" * 64)
    with pytest.raises(ConfigError, match=r"holds latents \(3, 2, 3, 4, 4\).* text \(n, up to 4, width\)"):
        open_shards(good, length=4)
    unfinished = shards(tmp_path / "unfinished")
    (unfinished / "data.json").unlink()
    with pytest.raises(ConfigError, match="is unfinished"):
        open_shards(unfinished)
    cut = shards(tmp_path / "cut")
    path = cut / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"00001\.safetensors is damaged"):
        open_shards(cut)
    path.unlink()
    with pytest.raises(ConfigError, match=r"00001\.safetensors is missing"):
        open_shards(cut)
    with pytest.raises(ConfigError, match="holds no shards"):
        (tmp_path / "empty").mkdir()
        open_shards(shards(tmp_path / "empty", counts=()))
    with pytest.raises(ConfigError, match="as many text embeddings as latents"):
        write_shard(tmp_path, 0, torch.zeros(2, *SHAPE), torch.zeros(1, 5, 6))


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    same, again = open_shards(shards(tmp_path / "a")), open_shards(shards(tmp_path / "b"))
    assert same.hash == again.hash != open_shards(shards(tmp_path / "c", counts=(3, 5))).hash


def test_micro_data_are_encoded_training_clips(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD", 5)
    config = DataConfig(clips=12, seed=4, cache=str(tmp_path))
    folder = micro_folder(base, config, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{i:05d}.safetensors" for i in range(3)), "data.json"]
    loader = LatentShards(folder, base_hash=base.hash, latent_shape=base.latent_shape, text_length=base.text_length)
    assert len(loader) == 12
    for number in (0, 7, 11):  # encoded one by one, by hand
        caption, clip = make_clip((4, number), held_out=False)
        assert not is_held_out(caption)
        item = loader.items([number])
        torch.testing.assert_close(item.latents, base.encode_videos(torch.from_numpy(clip)[None]), atol=1e-5, rtol=0)
        torch.testing.assert_close(item.text, base.encode_prompts([caption]), atol=1e-5, rtol=0)


def test_micro_data_are_encoded_once_per_content(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD", 3)
    encoded: list[int] = []
    encode = data._encode
    monkeypatch.setattr(data, "_encode", lambda base, clips: encoded.append(len(clips)) or encode(base, clips))
    config = DataConfig(clips=7, cache=str(tmp_path))
    folder = micro_folder(base, config, progress=False)
    assert micro_folder(base, config, progress=False) == folder and encoded == [3, 3, 1]
    before = (folder / "data.json").read_text()
    (folder / "data.json").unlink()  # as if killed before the second shard
    (folder / "00001.safetensors").unlink()
    micro_folder(base, config, progress=False)
    assert encoded == [3, 3, 1, 3] and (folder / "data.json").read_text() == before
    others = [DataConfig(clips=7, seed=1, cache=str(tmp_path)), DataConfig(clips=8, cache=str(tmp_path))]
    assert len({folder, *(micro_folder(base, other, progress=False) for other in others)}) == 3


def test_the_cache_lies_under_tmd_eval_home(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    folder = micro_folder(base, DataConfig(clips=2), progress=False)
    assert folder.parent == tmp_path / "latents"
    shutil.rmtree(folder)


def test_micro_clips_are_for_models_of_their_size(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "frames", FRAMES + 4)
    with pytest.raises(ConfigError, match=rf"has {FRAMES + 4} of {SIZE}x{SIZE}; set data.kind to shards"):
        micro_folder(base, DataConfig(clips=2, cache=str(tmp_path)), progress=False)
    assert not any(tmp_path.iterdir())
