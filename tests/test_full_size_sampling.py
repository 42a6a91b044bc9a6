"""What sampling does for large models: captions encoded once, networks kept out of the way, tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from students.base import Base, load_base
from students.checkpoint import open_checkpoint
from tests.tiny import TEXT_LENGTH, tiny_pipeline
from tmd_eval.generate import Settings, plan
from tmd_eval.prompts import single_prompt

PROMPTS = ["a red circle moves left", "a blue square", "a red circle moves left"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def cached(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("students.base.LARGE_ENCODER", 0)
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    return tmp_path / "text"


def refuse(prompts: list[str]) -> torch.Tensor:
    raise AssertionError("nothing was to be encoded")


def test_captions_are_encoded_once(pipeline: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_base(str(pipeline))
    direct = first.encode_prompts(PROMPTS)
    asked: list[list[str]] = []
    monkeypatch.setattr(first, "encode_prompts", lambda p: asked.append(p) or Base.encode_prompts(first, p))
    assert torch.equal(first.embeddings(PROMPTS), direct)
    assert asked == [PROMPTS[:2]]
    (folder,) = cached.iterdir()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2 and all(
        len(path.stem) == 64 for path in files
    )  # named by content, whatever the caption says
    later = load_base(str(pipeline))
    monkeypatch.setattr(later, "encode_prompts", refuse)
    assert torch.equal(later.embeddings(PROMPTS), direct)  # padding included: the text is attended to in full
    assert later.embeddings(PROMPTS).shape[1] == TEXT_LENGTH
    assert "_text_pipeline" not in vars(later)  # the encoder was not even loaded
    files[0].write_bytes(files[0].read_bytes()[:20])
    again = load_base(str(pipeline))
    assert torch.equal(again.embeddings(PROMPTS), direct)
    low = load_base(str(pipeline), dtype=torch.bfloat16)
    assert low.embeddings(PROMPTS).dtype == torch.bfloat16 and len(list(cached.iterdir())) == 2


def test_small_encoders_leave_no_files(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path))
    base = load_base(str(pipeline))
    assert torch.equal(base.embeddings(PROMPTS), base.encode_prompts(PROMPTS))
    assert not any(tmp_path.iterdir())


def test_a_full_disk_only_means_no_cache(pipeline: Path, cached: Path) -> None:
    cached.parent.joinpath("text").write_text("a file in the way")
    base = load_base(str(pipeline))
    assert torch.equal(base.embeddings(PROMPTS), base.encode_prompts(PROMPTS))


def test_offload_moves_one_network_at_a_time(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for both places here, so the order of moves is what can be seen."""
    plain, offloaded = open_checkpoint(pipeline), open_checkpoint(pipeline, offload=True)
    expected = plain.sample(PROMPTS, [1, 2, 3], m=2)
    moves: list[tuple[str, str]] = []
    move = torch.nn.Module.to

    def spy(self: torch.nn.Module, *places: object, **options: object) -> torch.nn.Module:
        if type(self).__name__ in ("UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan"):
            moves.append((type(self).__name__, str(places[0])))
        return move(self, *places, **options)

    for network in (offloaded.base.transformer, offloaded.base.vae, offloaded.base._text_pipeline.text_encoder):
        monkeypatch.setattr(type(network), "to", spy)
    assert torch.equal(offloaded.sample(PROMPTS, [1, 2, 3], m=2), expected)
    order = [name for name, _ in moves]
    assert order == [n for n in ("UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan") for _ in range(2)]
    moves.clear()
    plain.sample(PROMPTS, [1, 2, 3], m=2)
    assert not moves


def test_tiling_is_part_of_what_a_video_is(pipeline: Path, tmp_path: Path) -> None:
    plans = [
        plan(open_checkpoint(pipeline, vae_tiling=tiling), single_prompt("a red circle"), tmp_path, Settings(m=1))
        for tiling in (False, True)
    ]
    assert plans[0].units[0].key != plans[1].units[0].key
    assert "vae_tiling" not in plans[0].config and plans[1].config["vae_tiling"] is True
    vae = open_checkpoint(pipeline, vae_tiling=True).base.vae
    assert vae.use_tiling and not open_checkpoint(pipeline).base.vae.use_tiling
