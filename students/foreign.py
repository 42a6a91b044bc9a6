"""Few-step Wan students as other projects publish them: layout, weights under diffusers' names, and sampling.

| layout | what it is | names | sampled as |
|---|---|---|---|
| rcm | rCM's ``.pt``: keys ``net.*`` and a few counters | original Wan, linear patch embedding | SDE, no CFG |
| fastgen | FastGen's ``.pth``: ``model.net`` beside optimisers | ``transformer.`` + diffusers' | ODE, no CFG |
| fastvideo | FastVideo / FastWan, or a ``WanDMDPipeline`` folder | its own, or diffusers' with gates | SDE, no CFG |
| wan | original Wan and its re-packings | original Wan | not said: as the teacher |
| diffusers | the transformer alone | diffusers' | not said: as the teacher |

Only safetensors, or pickles through torch's ``weights_only`` loader, which runs no code.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from students.errors import ConfigError
from students.weights import check_safetensors, read_json

GATE = ".to_gate_compress."
GATES_NOTE = "trained with video sparse attention; its gates are left out and attention is full here"
INDEX = ".safetensors.index.json"
"""Ending of the file that lists the shards of large weights, such as 14B's; it stands for all of them."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a published student is sampled; the fields are those of :class:`students.spec.StudentSpec`."""

    method: str
    """Its method, as tables name it."""
    outer_grid: tuple[float, ...]
    """0 = t_0 < ... < t_M."""
    sampler: str
    """"ode" or "sde"."""
    gamma_outer: float | None = None
    """Shift for other numbers of steps; None: the noisiest points of the grid."""
    initial: str = "unit"
    """"unit" or "scaled"."""
    time_precision: str = "float64"
    """"float64" or "bfloat16"."""
    guidance: float = 1.0
    """Guidance scale; 1 is none."""
    source: str
    """Where these settings stand."""


def _rcm_time(t: float) -> float:
    """TrigFlow's t as the time of the straight path, sin t / (sin t + cos t)."""
    return math.sin(t) / (math.sin(t) + math.cos(t))


SCHEDULES = {
    "rcm": Schedule(
        method="rcm",
        outer_grid=(0.0, *(_rcm_time(t) for t in (1.0, 1.4, 1.5, math.atan(80.0)))),
        sampler="sde",
        initial="scaled",
        time_precision="bfloat16",
        source="rCM's wan2pt1_t2v_rcm_infer.py: sigma_max 80, t = 1.5, 1.4, 1.0, re-noising, no CFG",
    ),
    "fastgen": Schedule(
        method="dmd2",
        outer_grid=(0.0, 0.624, 0.833, 0.937, 0.999),
        sampler="ode",
        gamma_outer=5.0,
        initial="scaled",
        source="FastGen's WanT2V/config_dmd2.py: four steps, ode, no CFG",
    ),
    "fastvideo": Schedule(
        method="dmd2",
        outer_grid=(0.0, 0.522, 0.757, 1.0),
        sampler="sde",
        source="FastVideo's DMD recipe for Wan2.1: times 1000, 757, 522, re-noising, no CFG",
    ),
}
"""By layout; "wan" and "diffusers" files do not say how they are sampled."""


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """A transformer's weights from another project's file."""

    path: Path
    """The file."""
    layout: str
    """See the table of the module."""
    tensors: dict[str, Tensor]
    """Under diffusers' names; a linear patch embedding still has two dimensions."""
    schedule: Schedule | None
    """How it is sampled; None where nothing says so."""
    notes: tuple[str, ...] = ()
    """What was left out, and what that means."""

    @property
    def blocks(self) -> int:
        """L."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blocks."))

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.tensors["proj_out.weight"].shape[1]

    @property
    def dtypes(self) -> list[str]:
        """Precisions of the tensors, sorted."""
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()})

    @property
    def parameters(self) -> int:
        """How many numbers they are."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_foreign(path: Path) -> ForeignWeights:
    """Read a file of another project; tensors stay in their precision and on the CPU.

    Raises:
        ConfigError: unreadable, a pickle that needs code to load, or no text-to-video Wan transformer that can be read.
    """
    path = Path(path)
    state = _read(path)
    inner = state["model"].get("net") if isinstance(state.get("model"), Mapping) else None
    if isinstance(inner, Mapping):
        state, layout = inner, "fastgen"
    elif isinstance(state.get("model"), Mapping):
        raise ConfigError(
            f"{path} holds no network; a sharded run of FastGen keeps it in {path.stem}.net_model beside it: gather "
            "that with torch.distributed.checkpoint's dcp_to_torch_save."
        )
    elif "generator" in state or "generator_ema" in state:
        raise ConfigError(
            f"{path} is a checkpoint of CausVid or Self-Forcing; their students are causal (a cache of earlier "
            "frames), which tmd-eval does not sample."
        )
    else:
        layout = ""
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    notes: list[str] = []
    if any(key.startswith("net.") for key in tensors):
        layout = "rcm"
        if rest := [key for key in tensors if not key.startswith("net.")]:
            notes.append(f"{len(rest)} entries beside the network left out (such as {rest[0]})")
        tensors = _strip(tensors, "net.")
    elif any(key.startswith("transformer.blocks.") for key in tensors):
        layout = "fastgen"
        tensors = _strip(tensors, "transformer.")
    for prefix in ("model.diffusion_model.", "module."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = _strip(tensors, prefix)
    tensors, names = _diffusers_names(tensors, path)
    linear = tensors.get("patch_embedding.weight", torch.empty(0)).ndim == 2
    layout = layout or ("rcm" if names == "wan" and linear else names)
    tensors, layout = _drop_extras(tensors, layout, notes, path)
    _check_whole(tensors, path)
    return ForeignWeights(path=path, layout=layout, tensors=tensors, schedule=SCHEDULES.get(layout), notes=tuple(notes))


def build_transformer(weights: ForeignWeights, config: Path, dtype: torch.dtype | None = None) -> WanTransformer3DModel:
    """The transformer, in evaluation mode, frozen, on the CPU.

    Args:
        weights: of :func:`read_foreign`.
        config: ``config.json`` of the base model's transformer.
        dtype: precision, but for what diffusers keeps in float32; None for the file's own.

    Raises:
        ConfigError: the weights are not those of such a transformer.
    """
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(
            {key: value for key, value in read_json(config).items() if not key.startswith("_")}
        )
    rope = network.rope  # its buffers are in no file, so it is made again
    network.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    wanted = network.state_dict()
    tensors = dict(weights.tensors)
    patch = tensors.get("patch_embedding.weight")
    if patch is not None and patch.ndim == 2 and patch.numel() == wanted["patch_embedding.weight"].numel():
        tensors["patch_embedding.weight"] = patch.reshape(wanted["patch_embedding.weight"].shape)  # (D, c kt kh kw)
    lacking, foreign = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if lacking or foreign:
        what = f"lacks {lacking[0]}" if lacking else f"has {foreign[0]} beyond it"
        raise ConfigError(f"{weights.path} does not fit the transformer of {config.parent}: it {what}.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"{weights.path} does not fit the transformer of {config.parent}: {name} is {tuple(tensor.shape)}, not "
                f"{tuple(wanted[name].shape)}; give the base model it was distilled from."
            )
    full = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, tensor in tensors.items():
        keep = full & set(name.split("."))
        tensors[name] = tensor.to(torch.float32 if keep else (dtype or tensor.dtype)).contiguous()
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def pipeline_schedule(index: Mapping[str, Any], where: Path) -> Schedule | None:
    """The schedule that a pipeline folder's ``model_index.json`` states: ``dmd2_config``, or FastVideo's class.

    Raises:
        ConfigError: ``dmd2_config`` is not complete or makes no sense.
    """
    block = index.get("dmd2_config")
    if block is None:
        return SCHEDULES["fastvideo"] if index.get("_class_name") in ("WanDMDPipeline", "WanDMDPipelineV2") else None
    try:
        steps = int(block["num_inference_steps"])
        times = block.get("denoising_timesteps") or [999 * (1 - i / steps) // 1 for i in range(steps)]
        grid = (0.0, *sorted(float(time) / 1000 for time in times))
        if len(grid) != steps + 1:
            raise ValueError(f"{steps} steps but {len(times)} times")
        return Schedule(
            method=str(block.get("method", "dmd2")), outer_grid=grid, sampler=str(block.get("solver", "ode")),
            guidance=float(block.get("guidance_scale", 1.0)), source=f"dmd2_config in {where / 'model_index.json'}",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"dmd2_config in {where / 'model_index.json'} cannot be read ({error}); correct it."
        ) from error


def stored_in(path: Path) -> list[Path]:
    """The files that hold the weights: the file itself, or the shards that a ``.safetensors.index.json`` lists.

    Raises:
        ConfigError: the index cannot be read, or a shard is missing.
    """
    if not path.name.endswith(INDEX):
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise ConfigError(f"{path} lists no shards under weight_map; copy or download it again.")
    shards = [path.parent / Path(str(name)).name for name in sorted(set(names.values()))]
    if lacking := [shard for shard in shards if not shard.is_file()]:
        raise ConfigError(f"{lacking[0]} is missing, though {path.name} lists it; restore the file.")
    return shards


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors" or path.name.endswith(INDEX):
        found: dict[str, Tensor] = {}
        for part in stored_in(path):
            check_safetensors(part)
            found |= load_file(part)
        return found
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:1] not in (b"P", b"\x80"):  # a zip archive, or the plain pickle of torch before 1.6
            raise EOFError(f"it starts with {start!r}" if start else "it is empty")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=start[:1] == b"P")
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds objects that only running its code could restore, so it is not loaded; re-save its weights "
            "alone where it was made (torch.save of the state_dict, or safetensors)."
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ConfigError(
            f"{path} is truncated or no file of torch.save ({reason}); copy or download it again."
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path} holds a {type(state).__name__}, not a dictionary of weights.")
    return state


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


FASTVIDEO_NAMES = (
    (r"^patch_embedding\.proj\.", "patch_embedding."),
    (r"^condition_embedder\.text_embedder\.fc_in\.", "condition_embedder.text_embedder.linear_1."),
    (r"^condition_embedder\.text_embedder\.fc_out\.", "condition_embedder.text_embedder.linear_2."),
    (r"^condition_embedder\.time_embedder\.mlp\.fc_in\.", "condition_embedder.time_embedder.linear_1."),
    (r"^condition_embedder\.time_embedder\.mlp\.fc_out\.", "condition_embedder.time_embedder.linear_2."),
    (r"^condition_embedder\.time_modulation\.linear\.", "condition_embedder.time_proj."),
    (r"^blocks\.(\d+)\.attn2\.to_out\.(weight|bias)$", r"blocks.\1.attn2.to_out.0.\2"),
    (r"^blocks\.(\d+)\.to_out\.", r"blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.(to_[qkv]|norm_[qk])\.", r"blocks.\1.attn1.\2."),
    (r"^blocks\.(\d+)\.ffn\.fc_in\.", r"blocks.\1.ffn.net.0.proj."),
    (r"^blocks\.(\d+)\.ffn\.fc_out\.", r"blocks.\1.ffn.net.2."),
    (r"^blocks\.(\d+)\.self_attn_residual_norm\.norm\.", r"blocks.\1.norm2."),
)
"""FastVideo's names for its own modules, and diffusers'."""


def _diffusers_names(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    if "blocks.0.self_attn.q.weight" in tensors:
        return convert_wan_transformer_to_diffusers(dict(tensors)), "wan"
    if "blocks.0.attn1.to_q.weight" in tensors:
        return tensors, "diffusers"
    if "blocks.0.to_q.weight" in tensors:
        renamed = {}
        for name, tensor in tensors.items():
            for pattern, new in FASTVIDEO_NAMES:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
        return renamed, "fastvideo"
    first = next(iter(tensors), "nothing")
    raise ConfigError(
        f"{path} holds no Wan transformer in a known layout (first entry: {first}); known are rCM, FastGen, FastVideo, "
        "original Wan and diffusers."
    )


def _check_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Every block has what any block has, and there is an output layer; the rest shows once the base model is known."""
    parts = {name.split(".", 2)[2] for name in tensors if name.startswith("blocks.")}
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    wanted = ["proj_out.weight", *(f"blocks.{block}.{part}" for block in range(last + 1) for part in sorted(parts))]
    if lacking := [name for name in wanted if name not in tensors]:
        shards = "it is one of several shards, so name the .index.json beside it" if "-of-" in path.name else ""
        raise ConfigError(f"{path} lacks {lacking[0]} of a Wan transformer; {shards or 'copy or download it again'}.")


def _drop_extras(
    tensors: dict[str, Tensor], layout: str, notes: list[str], path: Path
) -> tuple[dict[str, Tensor], str]:
    """Leave out what sampling does not use; refuse what it would need."""
    for part, what in (
        ("r_embedder", "a second time embedding (MeanFlow), which a plain student has no place for"),
        ("image_embedder", "an image embedder (image-to-video), while tmd-eval samples text-to-video models"),
        ("attn_op.", "sparse linear attention (TurboDiffusion), which diffusers' Wan does not have"),
    ):
        if any(part in name for name in tensors):
            raise ConfigError(f"{path} has {what}.")
    gates = [name for name in tensors if GATE in name]
    if gates:
        notes.append(GATES_NOTE)
        layout = "fastvideo"
    scalars = [name for name in tensors if name.startswith("logvar_linear.")]
    if scalars:
        notes.append("logvar_linear, used in training only, left out")
    drop = {*gates, *scalars}
    return {name: tensor for name, tensor in tensors.items() if name not in drop}, layout
