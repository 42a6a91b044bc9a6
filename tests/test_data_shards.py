"""``tmd-eval data``: what lies in the shards, going on after any interruption, damage, and drawing from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from typer.testing import CliRunner

from students.base import Base, load_base
from students.data import DataConfig, open_data
from students.errors import ConfigError
from students.method import Batch
from students.sampling import VideoNoise, sample_teacher
from students.tar_shards import TarShards, pack
from tests.tiny import tiny_pipeline
from tmd_eval import encode, shards
from tmd_eval.cli import app
from tmd_eval.prompts import PromptSet
from tmd_eval.shards import Plan, make_shards
from tmd_eval.video import read_video, write_video

CAPTIONS = ["a red circle moves left", "a blue square moves up", "a green circle", "a red square", "a blue circle"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tiny_pipeline(tmp_path_factory.mktemp("pipeline"))))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of the model's own size and a manifest."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    rows = []
    for i, caption in enumerate(CAPTIONS):
        write_video(folder / f"{i:05d}-0.mp4", rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), 8, lossless=True)
        rows.append({"video": f"{i:05d}-0.mp4", "prompt": caption})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def opened(base: Base, folder: Path) -> TarShards:
    data = open_data(base, DataConfig(kind="shards", folder=str(folder)), first=lambda make: make())
    assert isinstance(data, TarShards)
    return data


@pytest.fixture(scope="module")
def encoded(base: Base, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "data"
    report = call("data", "encode", "--base", base.ref, "--videos", videos, "--out", out, "--shard-size", 2,
                  "--dtype", "float32")  # fmt: skip
    assert (report["samples"], report["shards"], report["skipped"], report["complete"]) == (5, 3, 0, True)
    return out


def test_shards_hold_the_encoded_videos(base: Base, videos: Path, encoded: Path) -> None:
    data = opened(base, encoded)
    every = []
    for i, caption in enumerate(CAPTIONS):
        latents, text = data.read(i)
        clip = torch.from_numpy(read_video(videos / f"{i:05d}-0.mp4")[0])
        torch.testing.assert_close(latents, base.encode_videos(clip[None])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(text, base.encode_prompts([caption])[0], atol=1e-6, rtol=0)
        every.append(latents)
    torch.testing.assert_close(data.negative, base.encode_prompts([base.negative_prompt]))
    statistics = json.loads((encoded / "data.json").read_text())["statistics"]
    stack = torch.stack(every).double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(statistics["latent_mean"], stack.mean(1), atol=1e-4)
    np.testing.assert_allclose(statistics["latent_spread"], stack.std(1, correction=0), atol=1e-4)
    tokens = [int(base.encode_prompts([c])[0].ne(0).any(1).sum()) for c in CAPTIONS]
    assert statistics["tokens_longest"] == max(tokens) and statistics["tokens_mean"] == pytest.approx(np.mean(tokens))


def test_a_tar_is_a_webdataset(base: Base, encoded: Path) -> None:
    """Members of one sample share a key and lie together; what the index says is what tarfile finds."""
    with tarfile.open(encoded / "00001.tar") as tar:
        members = tar.getmembers()
        keys = [member.name.split(".", 1) for member in members]
        record = json.loads(tar.extractfile("0000100001.json").read())  # type: ignore[union-attr]
        content = load(tar.extractfile("0000100001.safetensors").read())  # type: ignore[union-attr]
    assert keys == [[f"000010000{i}", ending] for i in range(2) for ending in ("safetensors", "json")]
    assert record == {"prompt": CAPTIONS[3], "source": "00003-0.mp4"}
    assert torch.equal(content["latents"], opened(base, encoded).read(3)[0])
    places = json.loads((encoded / "00001.json").read_text())["samples"]
    assert [place[:2] for place in places] == [[m.offset_data, m.size] for m in members if m.name.endswith("tensors")]


def test_going_on_makes_only_what_is_missing(
    base: Base, videos: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second shard: the rerun encodes what was not encoded, and the files are the same."""
    out, made = tmp_path / "data", []
    words = ("data", "encode", "--base", base.ref, "--videos", videos, "--out", out, "--shard-size", 2, "--dtype",
             "float32")  # fmt: skip
    encode_videos = Base.encode_videos

    def counting(self: Base, clips: torch.Tensor) -> torch.Tensor:
        made.append(len(clips))
        if len(made) == 4:
            raise KeyboardInterrupt
        return encode_videos(self, clips)

    monkeypatch.setattr(Base, "encode_videos", counting)
    assert CliRunner().invoke(app, [*map(str, words)]).exit_code != 0
    with pytest.raises(ConfigError, match="is unfinished"):
        opened(base, out)
    call(*words)
    assert len(made) == 6  # three, the killed one, and the two that were missing
    names = sorted(path.name for path in encoded.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (encoded / name).read_bytes() for name in names)
    call(*words)
    assert len(made) == 6
    with (out / "00001.tar").open("r+b") as file:  # same size, other content
        file.seek(600)
        file.write(b"\xff")
    call(*words)
    assert (out / "00001.tar").read_bytes() != (encoded / "00001.tar").read_bytes()
    call(*words, "--verify")
    assert (out / "00001.tar").read_bytes() == (encoded / "00001.tar").read_bytes() and len(made) == 8
    with pytest.raises(ConfigError, match=r"was begun with dtype = float32, now it is float16"):
        call(*words[:-1], "float16")


def test_ranks_share_the_shards(base: Base, encoded: Path, videos: Path, tmp_path: Path) -> None:
    clips, _ = encode.find_clips(videos, None)
    source = json.loads((encoded / "source.json").read_text())
    source = {key: value for key, value in source.items() if key not in ("shard_size", "base_hash", "latent_shape")}
    made: list[list[str]] = [[], []]

    def maker(rank: int) -> shards.Make[encode.Clip]:
        make = encode.encoder(base, torch.float32)

        def noting(batch: list[encode.Clip]) -> list[Any]:
            made[rank].extend(clip.path.name for clip in batch)
            return make(batch)

        return noting

    reports = [
        make_shards(
            Plan(folder=tmp_path, source=source, items=clips, shard_size=2, batch_size=1, rank=rank, world=2),
            maker(rank), base, verify=False, progress=False,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    assert [report["complete"] for report in reports] == [False, True]
    assert [[int(name[:5]) for name in names] for names in made] == [[0, 1, 4], [2, 3]]
    for path in encoded.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_cannot_be_used_is_left_out_and_counted(base: Base, videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    (folder / "00001-0.mp4").write_bytes((videos / "00001-0.mp4").read_bytes()[:300])
    write_video(folder / "00002-0.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8, lossless=True)
    (folder / "bare.mp4").write_bytes(b"no caption")
    report = call("data", "encode", "--base", base.ref, "--videos", folder, "--out", tmp_path / "data")
    assert (report["samples"], report["skipped"]) == (3, 2)
    reasons = {e["item"]: e["reason"] for e in json.loads((tmp_path / "data" / "data.json").read_text())["skipped"]}
    assert "00001-0.mp4 is" in reasons["00001-0.mp4"] and "too short: 4 frames" in reasons["00002-0.mp4"]
    for path in folder.glob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"None of the 5 samples could be made; the first: .*00000-0\.mp4"):
        call("data", "encode", "--base", base.ref, "--videos", folder, "--out", tmp_path / "none")
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"None of the 6 videos in .* has a caption"):
        call("data", "encode", "--base", base.ref, "--videos", folder, "--out", tmp_path / "none")


def test_captions_come_from_a_list_or_text_files(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "b.txt").write_text(" a red circle \n")
    clips, bare = encode.find_clips(folder, None)
    assert [(clip.path.name, clip.caption) for clip in clips] == [("b.mp4", "a red circle")] and bare == 2
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"file_name": "../../x/a.mp4", "caption": "one"}\n\n{"file": "c.mp4", "text": "two"}\n')
    clips, bare = encode.find_clips(folder, listed)
    assert [(clip.path, clip.caption) for clip in clips] == [(folder / "a.mp4", "one"), (folder / "c.mp4", "two")]
    listed.write_text('{"file": "a.mp4"}\n')
    with pytest.raises(ConfigError, match="line 1: not a JSON object with one of file, video"):
        encode.find_clips(folder, listed)


def test_no_caption_is_made_of_null_and_other_encodings_are_named(videos: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in videos.iterdir() if path.suffix == ".mp4")
    rows = [{"file": name, "text": None if place == 0 else "a cup"} for place, name in enumerate(names)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips, bare = encode.find_clips(videos, tmp_path / "captions.jsonl")
    assert names[0] not in [clip.path.name for clip in clips] and bare == 1 and {c.caption for c in clips} == {"a cup"}
    (tmp_path / "x.mp4").write_bytes(b"")
    (tmp_path / "x.txt").write_bytes("façade".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.txt cannot be read as text .*save it as UTF-8"):
        encode.find_clips(tmp_path, None)


def test_a_folder_that_another_rank_just_began_is_gone_on_with(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = shards.Plan(folder=tmp_path / "data", source={"kind": "x"}, items=[1], shard_size=1, batch_size=1, world=2)
    plan.folder.mkdir()
    listing = Path.iterdir

    def late(path: Path) -> Any:
        monkeypatch.undo()
        shards._claim(plan, base)  # the other rank, between our two looks
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", late)
    shards._claim(plan, base)
    assert json.loads((plan.folder / "source.json").read_text())["kind"] == "x"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no data"):
        shards._claim(dataclasses.replace(plan, folder=tmp_path / "full"), base)


def test_fit_scales_cuts_and_resamples(base: Base) -> None:
    """Twice the rate and twice the size, wider: every second frame, the middle."""
    frames = np.zeros((20, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10
    video = encode.fit(frames, 16, base)
    assert video.shape == (9, 32, 32, 3)
    assert video[:, 16, 16, 0].tolist() == [20 * i for i in range(9)] and (video[4, :, 4:28] == 80).all()
    with pytest.raises(ConfigError, match="too short: 16 frames at 16 fps, but 9 at 8 fps"):
        encode.fit(frames[:16], 16, base)


def test_synthesized_latents_are_the_teachers(base: Base, tmp_path: Path) -> None:
    """Each sample is what the teacher's sampler makes of the recorded seed, whatever the batch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left\n../a blue square\n")
    out = tmp_path / "data"
    words = ("data", "synthesize", "--base", base.ref, "--prompts", prompts, "--m", 2, "--samples-per-prompt", 2,
             "--out", out, "--dtype", "float32")  # fmt: skip
    assert call(*words, "--dry-run")["missing_shards"] == 1 and not out.exists()
    assert call(*words, "--batch-size", 3)["samples"] == 4
    data = opened(base, out)
    with tarfile.open(out / "00000.tar") as tar:
        records = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith("json")]  # type: ignore[union-attr]
    assert [r["source"] for r in records] == ["00000-0", "00000-1", "00001-0", "00001-1"]
    assert len({r["seed"] for r in records}) == 4 and records[3]["prompt"] == "../a blue square"
    for i, record in enumerate(records):
        noise = VideoNoise([record["seed"]], base.latent_shape).draw()
        text = base.encode_prompts([record["prompt"]])
        negative = base.encode_prompts([base.negative_prompt])
        expected = sample_teacher(base, text, negative, noise, 2, base.guidance)
        torch.testing.assert_close(data.read(i)[0][None], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="was begun with m = 2, now it is 3"):
        call(*words[:7], 3, *words[8:])
    longer = Path(shutil.copytree(base.folder, tmp_path / "longer"))  # the same weights, videos of another length
    facts = json.loads((longer / "base.json").read_text())
    (longer / "base.json").write_text(json.dumps({**facts, "frames": 13}))
    with pytest.raises(ConfigError, match="was begun with latent_shape = "):
        call(*(longer if str(word) == str(base.folder) else word for word in words))
    for change, named in (
        ({"negative_prompt": "another"}, "negative_prompt = "), ({"guidance": 2.5}, "w = 3.0, now it is 2.5"),
        ({"text_length": 5}, "text_length = "),
    ):  # fmt: skip
        (longer / "base.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(ConfigError, match=f"was begun with {named}"):
            call(*(longer if str(word) == str(base.folder) else word for word in words))
    (longer / "base.json").write_text(json.dumps(facts))
    scheduler = longer / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "solver_order": 1}))
    with pytest.raises(ConfigError, match="was begun with scheduler = "):
        call(*(longer if str(word) == str(base.folder) else word for word in words))
    source = json.loads((out / "source.json").read_text())
    (out / "source.json").write_text(json.dumps({k: v for k, v in source.items() if k not in ("w", "scheduler")}))
    assert call(*words)["complete"]  # a folder of before these were recorded
    same = encode.wishes(PromptSet(name="x", prompts=("p", "q")), 3, 0)
    assert [w.seed for w in same[:2]] == [w.seed for w in encode.wishes(PromptSet(name="x", prompts=("p",)), 2, 0)]


def test_data_of_a_larger_teacher_fit_but_not_of_another_vae(base: Base, encoded: Path, tmp_path: Path) -> None:
    """A 1.3B student learns from 14B's latents: only VAE and text encoder must be the same."""
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    shutil.copytree(
        tiny_pipeline(tmp_path / "larger", blocks=5) / "transformer", other / "transformer", dirs_exist_ok=True
    )
    larger = load_base(str(other))
    assert larger.hash != base.hash and len(opened(larger, encoded)) == 5
    weights = load((other / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    changed = {name: tensor + 0.01 for name, tensor in weights.items()}
    (other / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(save(changed))
    with pytest.raises(ConfigError, match=r"was made with VAE and text encoder .* make the data with the same ones"):
        opened(load_base(str(other)), encoded)


def numbers(batch: Batch) -> list[int]:
    assert (batch.latents.flatten(1) == batch.latents[:, :1, 0, 0, 0]).all()
    return batch.latents[:, 0, 0, 0, 0].int().tolist()


@pytest.fixture
def counted(base: Base, tmp_path: Path) -> Path:
    """Ten samples in four shards; the latents of sample i are i."""

    def make(items: list[int]) -> list[Any]:
        return [pack(torch.full(base.latent_shape, float(i)), torch.ones(3, 16), {}, torch.float16) for i in items]

    plan = Plan(folder=tmp_path / "counted", source={}, items=range(10), shard_size=3, batch_size=2)
    make_shards(plan, make, base, verify=False, progress=False)
    return tmp_path / "counted"


def test_draws_depend_on_nothing_but_seed_and_iteration(base: Base, counted: Path) -> None:
    whole = {i: numbers(opened(base, counted).draw(0, i, 4, slice(0, 4))) for i in (5, 1, 2)}
    again = opened(base, counted)
    for i in (2, 5, 1):
        assert numbers(again.draw(0, i, 4, slice(0, 2))) + numbers(again.draw(0, i, 4, slice(2, 4))) == whole[i]
    first = [n for i in range(1, 6) for n in numbers(again.draw(0, i, 2, slice(0, 2)))]
    assert sorted(first) == list(range(10)) and first != sorted(first)  # an epoch
    assert again.broken == 0 and again.draw(0, 1, 4, slice(0, 1)).text[0, 3:].eq(0).all()


def test_damaged_samples_are_replaced_and_counted(base: Base, counted: Path) -> None:
    start = json.loads((counted / "00001.json").read_text())["samples"][1][0]  # sample 4
    with (counted / "00001.tar").open("r+b") as file:
        file.seek(start + 200)
        file.write(b"\x55")
    draws = [opened(base, counted) for _ in range(2)]
    seen = [[n for i in range(1, 11) for n in numbers(data.draw(0, i, 2, slice(0, 2)))] for data in draws]
    assert seen[0] == seen[1] and 4 not in seen[0] and draws[0].broken == draws[1].broken == 1
    with (counted / "00001.tar").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match=r"00001\.tar is missing, half-written or another one"):
        opened(base, counted)


def test_values_beyond_the_storage_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not finite in torch\.float16; use a wider --dtype"):
        pack(torch.full((1, 1, 1, 1), 1e5), torch.ones(1, 2), {}, torch.float16)
