"""Students of other projects, on random weights laid out as those projects lay them out."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from students.checkpoint import open_checkpoint
from students.errors import ConfigError
from students.foreign import build_transformer, read_foreign
from students.published import default_base, open_file
from students.sampling import VideoNoise, sample_plain
from tests.tiny import tiny_pipeline, tiny_transformer

PROMPT = ["a red circle moves left"]
ORIGINAL = {  # diffusers' names and those of Wan's own repository, from its model.py
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3", "proj_out": "head.head",
}  # fmt: skip


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in ORIGINAL.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\1{ours}", name)
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        renamed[name] = tensor
    return renamed


def rcm(state: dict[str, Tensor]) -> dict[str, Any]:
    named = original_names(state)
    weight = named["patch_embedding.weight"]
    named["patch_embedding.weight"] = weight.flatten(1)  # a linear layer on (c, kt, kh, kw)
    counters = {"accum_image_sample_counter": torch.tensor(0), "accum_iteration": torch.tensor(10000)}
    return {**{f"net.{name}": tensor for name, tensor in named.items()}, **counters}


def fastgen(state: dict[str, Tensor]) -> dict[str, Any]:
    net = {f"transformer.{name}": tensor for name, tensor in state.items()}
    net |= {"transformer.logvar_linear.weight": torch.zeros(1, 24), "transformer.logvar_linear.bias": torch.zeros(1)}
    fake = {name: tensor + 1 for name, tensor in net.items()}
    return {
        "model": {"net": net, "fake_score": fake, "discriminator": {"head.weight": torch.zeros(3)}},
        "optimizer": {"net": {"state": {}, "param_groups": [{"lr": 1e-5}]}}, "scheduler": {}, "grad_scaler": None,
        "callbacks": None, "iteration": 6000,
    }  # fmt: skip


def fastvideo(state: dict[str, Tensor]) -> dict[str, Any]:
    gates = {f"blocks.{i}.to_gate_compress.{kind}": torch.zeros(24) for i in range(4) for kind in ("weight", "bias")}
    return {**state, **gates}


def fastvideo_own(state: dict[str, Tensor]) -> dict[str, Any]:
    names = (
        (r"^patch_embedding\.", "patch_embedding.proj."), (r"text_embedder\.linear_1", "text_embedder.fc_in"),
        (r"text_embedder\.linear_2", "text_embedder.fc_out"), (r"time_embedder\.linear_1", "time_embedder.mlp.fc_in"),
        (r"time_embedder\.linear_2", "time_embedder.mlp.fc_out"), (r"time_proj", "time_modulation.linear"),
        (r"attn1\.to_out\.0", "to_out"), (r"attn2\.to_out\.0", "attn2.to_out"), (r"attn1\.(to_[qkv]|norm_[qk])", r"\1"),
        (r"ffn\.net\.0\.proj", "ffn.fc_in"), (r"ffn\.net\.2", "ffn.fc_out"),
        (r"norm2\.", "self_attn_residual_norm.norm."),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str, str]] = {
    "rcm": (rcm, "rCM_Wan2.1_T2V_1.3B_480p.pt", "rcm"),
    "rcm without net.": (
        lambda s: {k.removeprefix("net."): v for k, v in rcm(s).items() if "accum" not in k},
        "a.pt",
        "rcm",
    ),
    "fastgen": (fastgen, "0006000.pth", "fastgen"),
    "fastvideo, diffusers' names": (fastvideo, "generator.safetensors", "fastvideo"),
    "fastvideo, its own": (fastvideo_own, "model.safetensors", "fastvideo"),
    "original Wan": (original_names, "diffusion_pytorch_model.safetensors", "wan"),
    "ComfyUI": (
        lambda s: {f"model.diffusion_model.{k}": v for k, v in original_names(s).items()},
        "c.safetensors",
        "wan",
    ),
    "diffusers": (dict, "transformer.safetensors", "diffusers"),
}


def write(folder: Path, layout: str, state: dict[str, Tensor]) -> Path:
    make, name, _ = LAYOUTS[layout]
    if name.endswith(".safetensors"):
        save_file({key: tensor.clone() for key, tensor in make(state).items()}, folder / name)
    else:
        torch.save(make(state), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"), patch=(1, 2, 2))


@pytest.fixture(scope="module")
def student() -> WanTransformer3DModel:
    return tiny_transformer(seed=5).to(torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_weights_to_the_bit(
    layout: str, pipeline: Path, student: WanTransformer3DModel, tmp_path: Path
) -> None:
    weights = read_foreign(write(tmp_path, layout, student.state_dict()))
    assert weights.layout == LAYOUTS[layout][2] and weights.blocks == 4 and weights.width == 24
    built = build_transformer(weights, pipeline / "transformer" / "config.json")
    for name, tensor in student.state_dict().items():
        mine = built.state_dict()[name]
        full = set(WanTransformer3DModel._keep_in_fp32_modules) & set(name.split("."))
        assert mine.dtype == (torch.float32 if full else torch.bfloat16)
        assert torch.equal(mine.to(torch.bfloat16), tensor), name
    assert torch.equal(built.rope.freqs_cos, tiny_transformer().rope.freqs_cos)


@pytest.mark.parametrize(
    "layout, times, sampler",
    [("rcm", [988, 932, 852, 608], "sde"), ("fastgen", [999, 937, 833, 624], "ode"),
     ("fastvideo, its own", [1000, 757, 522], "sde")],
)  # fmt: skip
def test_one_ckpt_samples_as_its_authors_do(
    layout: str, times: list[int], sampler: str, pipeline: Path, student: WanTransformer3DModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("students.published.WAN_BASES", {(24, 4): str(pipeline)})
    checkpoint = open_checkpoint(write(tmp_path, layout, student.state_dict()))
    assert checkpoint.kind == "student" and checkpoint.spec is not None and checkpoint.spec.plain
    seen: list[float] = []
    handle = checkpoint.network.condition_embedder.register_forward_pre_hook(lambda m, a: seen.append(a[0][0].item()))
    video = checkpoint.sample(PROMPT, [3])
    handle.remove()
    assert seen == pytest.approx(times, rel=1e-12)  # one pass a step: CFG-free students never pay for CFG
    settings = checkpoint.settings()
    assert (settings["forward_passes"], settings["guidance"], settings["sampler"]) == (len(times), 1.0, sampler)
    noise = VideoNoise([3], checkpoint.base.latent_shape)
    x1 = noise.draw() * (times[0] / 1000 if layout == "fastgen" else 80 / 81 if layout == "rcm" else 1.0)
    text = checkpoint.base.encode_prompts(PROMPT)
    latents = sample_plain(
        checkpoint.network, text, x1, checkpoint.spec.outer(None), sampler, noise.draw,
        bf16_times=layout == "rcm",
    )  # fmt: skip
    assert torch.equal(video, checkpoint.base.decode(latents))
    fewer = checkpoint.settings(m=2)
    assert fewer["m"] == 2
    assert len(checkpoint.hash) == 64 and checkpoint.hash != open_checkpoint(pipeline).hash


def test_a_file_without_known_sampling_is_a_teacher(
    pipeline: Path, student: WanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("students.published.WAN_BASES", {(24, 4): str(pipeline)})
    path = write(tmp_path, "original Wan", load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors"))
    same, base = open_checkpoint(path), open_checkpoint(pipeline)
    assert same.kind == "teacher" and same.settings() == base.settings() and same.hash != base.hash
    assert torch.equal(same.sample(PROMPT, [1], m=2), base.sample(PROMPT, [1], m=2))
    other = open_checkpoint(write(tmp_path, "original Wan", student.float().state_dict()))
    assert not torch.equal(other.sample(PROMPT, [1], m=2), base.sample(PROMPT, [1], m=2))


def test_pipeline_folders_of_few_step_students(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline, tmp_path / "served"))
    index = json.loads((folder / "model_index.json").read_text())

    def state(**changes: Any) -> None:
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))

    block = {
        "num_inference_steps": 4,
        "denoising_timesteps": [999, 937, 833, 624],
        "solver": "ode",
        "guidance_scale": 1.0,
    }
    state(dmd2_config=block)
    settings = open_checkpoint(folder).settings()
    assert (settings["role"], settings["m"], settings["guidance"], settings["sampler"]) == ("student", 4, 1.0, "ode")
    assert open_checkpoint(folder).spec.outer(None).tolist() == [0, 0.624, 0.833, 0.937, 0.999]  # type: ignore[union-attr]
    state(dmd2_config={"num_inference_steps": 2, "solver": "sde"})  # servers then spread the times evenly from 999
    assert open_checkpoint(folder).spec.outer(None).tolist() == [0, 0.499, 0.999]  # type: ignore[union-attr]
    state(_class_name="WanDMDPipeline")
    assert open_checkpoint(folder).settings()["m"] == 3
    for bad in ({"num_inference_steps": 3, "denoising_timesteps": [999]}, {"denoising_timesteps": [999]}, 4):
        state(dmd2_config=bad)
        with pytest.raises(ConfigError, match="dmd2_config"):
            open_checkpoint(folder)


def test_a_model_in_shards_is_opened_by_its_index(
    pipeline: Path, student: WanTransformer3DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14B's files come in shards, in original names too; the hash covers every one of them."""
    monkeypatch.setattr("students.published.WAN_BASES", {(24, 4): str(pipeline)})
    state = original_names(student.state_dict())
    places = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: state[name].clone() for name in state if places[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    opened = open_checkpoint(index)
    whole = open_checkpoint(write(tmp_path, "original Wan", student.state_dict()))
    assert all(torch.equal(t, whole.network.state_dict()[n]) for n, t in opened.network.state_dict().items())
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(second).items()}, second)
    assert open_checkpoint(index).hash != opened.hash
    with pytest.raises(ConfigError, match=r"name their file, such as .*index\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"name the \.index\.json beside it|no Wan transformer"):
        read_foreign(second)
    second.unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00002\.safetensors is missing, though"):
        open_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="lists no shards"):
        open_checkpoint(index)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/tmd-eval-must-not-exist"),))


def test_what_cannot_or_must_not_be_read(pipeline: Path, student: WanTransformer3DModel, tmp_path: Path) -> None:
    state = student.state_dict()
    path = tmp_path / "bad.pt"

    def refuse(what: str, value: Any) -> None:
        torch.save(value, path)
        with pytest.raises(ConfigError, match=what) as caught:
            open_file(path, str(pipeline))
        assert "\n" not in str(caught.value)

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match=r"not loaded|truncated"):
        read_foreign(path)
    for page in (b"<html>404</html>", b"", b"P"):
        path.write_bytes(page)
        with pytest.raises(ConfigError, match=r"truncated or no file of torch\.save"):
            read_foreign(path)
    refuse("only running its code", {"net.x": Payload()})
    refuse(r"bad\.net_model beside it", {"model": {}, "iteration": 5})
    refuse(r"lacks proj_out\.weight", {k: v for k, v in rcm(state).items() if "head.head" not in k})
    refuse(r"lacks blocks\.2\.", {k: v for k, v in rcm(state).items() if "blocks.2." not in k})
    assert not Path("/tmp/tmd-eval-must-not-exist").exists()
    refuse("causal", {"generator_ema": state})
    refuse("no Wan transformer in a known layout", {"a": torch.zeros(1)})
    refuse("MeanFlow", {**state, "r_embedder.time_proj.weight": torch.zeros(1)})
    refuse("lacks blocks.0", {k: v for k, v in state.items() if k != "blocks.0.ffn.net.2.bias"})
    refuse(r"blocks.0.ffn.net.2.bias is \(3,\), not \(24,\)", {**state, "blocks.0.ffn.net.2.bias": torch.zeros(3)})
    refuse("extra beyond", {**state, "extra": torch.zeros(3)})
    torch.save(rcm(state), path, _use_new_zipfile_serialization=False)  # as torch before 1.6 wrote
    assert read_foreign(path).layout == "rcm"
    whole = write(tmp_path, "rcm", state).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="truncated"):
        read_foreign(path)
    with pytest.raises(ConfigError, match=r"width 24 and 4 blocks, .* --base"):
        default_base(read_foreign(write(tmp_path, "rcm", state)))
