"""The base model: its pipeline folder, what is refused, and the pure functions on its transformer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from students.base import Base, clean, features, guided, load_base
from students.errors import ConfigError, EnvironmentMissingError
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_pipeline, tiny_transformer

PROMPTS = ["a red circle moves left", "a blue square moves up slowly on a dark background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_facts_and_shapes(base: Base, folder: Path) -> None:
    assert base.ref == str(folder.resolve()) and base.revision is None
    assert (base.text_length, base.negative_prompt, base.guidance, base.blocks) == (TEXT_LENGTH, "", 3.0, 4)
    assert (base.frames, base.height, base.width, base.fps) == (9, 32, 32, 8)
    assert base.latent_shape == (4, 3, 4, 4)


def test_wan_facts_are_the_default(copy: Path) -> None:
    (copy / "base.json").unlink()
    base = load_base(str(copy))
    assert (base.text_length, base.frames, base.height, base.width, base.fps) == (512, 81, 480, 832, 16)
    assert base.guidance == 5.0 and base.negative_prompt.endswith("倒着走")
    assert base.latent_shape == (4, 21, 60, 104)


def test_prompts_are_encoded_as_the_pipeline_does(base: Base, folder: Path) -> None:
    embeddings = base.encode_prompts(PROMPTS)
    pipeline = WanPipeline.from_pretrained(folder)
    expected = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]
    assert embeddings.shape == (2, TEXT_LENGTH, TEXT_WIDTH)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    assert not embeddings[0, 6:].any() and embeddings[0, :6].abs().sum(-1).all()  # 5 words and the end token


def test_decode_undoes_the_normalisation(base: Base) -> None:
    """The statistics are applied by hand here, and the VAE called directly."""
    z = torch.randn(2, *base.latent_shape)
    mean = torch.tensor([0.1, -0.2, 0.0, 0.3]).view(1, 4, 1, 1, 1)
    std = torch.tensor([0.5, 1.0, 2.0, 1.5]).view(1, 4, 1, 1, 1)
    with torch.no_grad():
        pixels = base.vae.decode(z * std + mean).sample  # (B, 3, T, H, W) in about [-1, 1]
    videos = base.decode(z)
    assert videos.dtype == torch.uint8 and videos.shape == (2, 9, 32, 32, 3)
    expected = (pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5).clamp(0, 1) * 255
    assert (videos.float() - expected).abs().max() <= 0.5 + 1e-3


def test_encode_takes_the_mode_and_normalises(base: Base) -> None:
    videos = torch.randint(0, 256, (2, 9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = base.encode_videos(videos)
    assert latents.shape == (2, *base.latent_shape)
    with torch.no_grad():
        z = base.vae.encode(videos.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mean
    for channel, (mean, std) in enumerate(zip((0.1, -0.2, 0.0, 0.3), (0.5, 1.0, 2.0, 1.5), strict=True)):
        torch.testing.assert_close(latents[:, channel], (z[:, channel] - mean) / std, atol=1e-5, rtol=0)
    torch.testing.assert_close(base.encode_videos(videos.float() / 255), latents, atol=1e-5, rtol=0)


def test_hash_is_that_of_the_weights_wherever_they_lie(base: Base, copy: Path) -> None:
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.glob("*/*.safetensors"))
    assert len(digests) == 3
    assert load_base(str(copy)).hash == base.hash == hashlib.sha256("".join(digests).encode()).hexdigest()
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_base(str(copy)).hash != base.hash


def test_weights_first_used_in_inference_mode_still_train(folder: Path) -> None:
    base = load_base(str(folder))
    with torch.inference_mode():
        text = base.encode_prompts(PROMPTS).clone()
        base.transformer(torch.randn(2, 4, 3, 4, 4), torch.tensor([5.0, 6.0]), text)
    x = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    v, _ = features(base.transformer, x, torch.tensor([0.2, 0.3]), torch.randn(2, TEXT_LENGTH, TEXT_WIDTH), (1,))
    v.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in base.transformer.parameters())


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_named(copy: Path, component: str) -> None:
    (path,) = (copy / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=rf"{component}/.*safetensors is truncated"):
        load_base(str(copy))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_component_that_lacks_a_tensor_is_refused(copy: Path, part: str) -> None:
    """Libraries would fill it with random values and only warn."""
    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    gone = sorted(tensors)[3]
    save_file({name: value for name, value in tensors.items() if name != gone}, path, metadata={"format": "pt"})
    base = load_base(str(copy))
    with pytest.raises(ConfigError, match=f"/{part} cannot be loaded as .*"):
        _ = base.encode_prompts(PROMPTS) if part == "text_encoder" else getattr(base, part)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (path,) = (copy / "transformer").glob("*.safetensors")
    path.unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        load_base(str(copy))
    torch.save({}, copy / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights"):
        load_base(str(copy))


def test_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "part-2.safetensors"}}
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"part-2\.safetensors is missing"):
        load_base(str(copy))


@pytest.mark.parametrize(
    "record, what",
    [
        ({"text_lenght": 12}, "unknown key 'text_lenght'"),
        ({"frames": "nine"}, "frames must be of type int"),
        ({"fps": 0}, "fps is 0"),
        ({"flow_shift": 5.0}, "flow_shift 5.0"),
    ],
)
def test_bad_facts_are_refused(copy: Path, record: dict[str, object], what: str) -> None:
    (copy / "base.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=what):
        load_base(str(copy))


def test_damaged_json_is_named(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"vae/config\.json is not valid JSON"):
        load_base(str(copy))


def test_wan22_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"Wan2\.2"):
        load_base(str(copy))


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    (tmp_path / "runs").mkdir()
    for ref in ("/no/such/folder", "./gone", "nowhere", "runs/student-1", "a/b/c", ""):
        with pytest.raises(ConfigError):
            load_base(ref)
    with pytest.raises(ConfigError, match="model_index"):
        load_base("runs")
    with pytest.raises(EnvironmentMissingError, match=r"hf download owner/name --revision abc"):
        load_base("owner/name@abc")  # tests run with HF_HUB_OFFLINE=1
    monkeypatch.setattr("students.base.micro_folder", lambda: tmp_path / "absent")
    with pytest.raises(EnvironmentMissingError, match="reinstall"):
        load_base("micro")


def test_guided_and_clean() -> None:
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(c, u, 5.0), 5 * c - 4 * u)
    assert torch.equal(guided(c, c, 3.0), c)
    x, x1, t = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), torch.tensor([0.25, 0.999], dtype=torch.float64)
    x_t = torch.stack([(1 - t[i].item()) * x[i] + t[i].item() * x1[i] for i in range(2)])
    torch.testing.assert_close(clean(x_t, t, x1 - x), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)])
def test_features_are_the_blocks_outputs_in_place(patch: tuple[int, int, int]) -> None:
    transformer = tiny_transformer(patch)
    x, t, text = torch.randn(2, 4, 3, 4, 4), torch.tensor([0.2, 0.7]), torch.randn(2, TEXT_LENGTH, TEXT_WIDTH)
    v, maps = features(transformer, x, t, text, (3, 1))
    torch.testing.assert_close(v, transformer(x, 1000 * t, text).sample, atol=1e-6, rtol=0)
    assert not any(block._forward_hooks for block in transformer.blocks)
    # The last block's map must yield v: norm_out, modulation and proj_out act per token, so check one patch by hand.
    channels = 24 // (patch[0] * patch[1] * patch[2])
    assert [tuple(m.shape) for m in maps] == [(2, channels, 3, 4, 4)] * 2 and all(m.is_contiguous() for m in maps)
    h, w = patch[1:]
    token = maps[0][0, :, 1, h : 2 * h, 0:w].permute(1, 2, 0).flatten()  # frame 1, second row of patches, first column
    temb = transformer.condition_embedder(1000 * t, text)[0][0]
    shift, scale = transformer.scale_shift_table[0] + temb
    out = transformer.proj_out(torch.nn.functional.layer_norm(token, (24,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(out.view(h, w, 4).permute(2, 0, 1), v[0, :, 1, h : 2 * h, 0:w], atol=1e-5, rtol=0)


def test_features_carry_gradients_and_refuse_missing_blocks() -> None:
    transformer = tiny_transformer().requires_grad_(False)
    x, t, text = torch.randn(1, 4, 3, 4, 4, requires_grad=True), torch.tensor([0.2]), torch.randn(1, 3, TEXT_WIDTH)
    features(transformer, x, t, text, (0,))[1][0].square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="block 4 does not exist"):
        features(transformer, x, t, text, (1, 4))
