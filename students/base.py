"""The base model: the teacher's pipeline folder (Wan2.1 or micro) and the pure functions on its transformer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from students.errors import ConfigError, EnvironmentMissingError
from students.facts import read_facts
from students.machine import home
from students.parallel_context import gather_tokens, join
from students.text_cache import TextCache
from students.tmd import unpatchify
from students.weights import combined_hash, read_json, weight_files

COMPONENTS = ("transformer", "vae", "text_encoder")
TIED = {"shared.weight", "encoder.embed_tokens.weight"}
"""UMT5's one table of words; files hold it under either name."""
LARGE_ENCODER = 2**26
"""Bytes of text encoder from which captions' embeddings are kept on disk; below, encoding costs less than a file."""


class Base:
    """A frozen teacher with its VAE and text encoder, each loaded when first used; made by :func:`load_base`.

    Attributes:
        ref: "micro", a hub id, or the absolute path of a pipeline folder.
        revision: the commit of a hub id, else None.
        folder: where the pipeline lies.
        text_length, negative_prompt, frames, height, width, fps, guidance: see :class:`Facts`.
        blocks: L.
        latent_shape: (C, T, H, W) of one video's latents.
        heads, tokens: of the transformer's attention, and of one video.
        offload: networks lie in the CPU's memory and visit the device only while they compute.
        vae_tiling: the VAE decodes overlapping tiles: less memory, and pixels near the seams differ slightly.
    """

    def __init__(
        self,
        ref: str,
        revision: str | None,
        folder: Path,
        device: str | torch.device,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        self.ref, self.revision, self.folder = ref, revision, folder
        self.device, self.dtype = torch.device(device), dtype
        self.offload, self.vae_tiling = offload, vae_tiling
        index = read_json(folder / "model_index.json")
        if (index.get("transformer_2") or [None])[0] is not None or index.get("expand_timesteps"):
            raise ConfigError(f"{ref} is a Wan2.2 pipeline (two transformers or a time per token); use a Wan2.1 one.")
        for component in COMPONENTS:
            weight_files(folder / component)
        transformer = read_json(folder / "transformer" / "config.json")
        transformer = transformer.get(
            "transformer", transformer
        )  # an exported TMD student names its teacher's shape there
        vae = read_json(folder / "vae" / "config.json")
        facts = read_facts(folder)
        self.text_length, self.negative_prompt = facts.text_length, facts.negative_prompt
        self.frames, self.height, self.width, self.fps = facts.frames, facts.height, facts.width, facts.fps
        self.guidance = facts.guidance
        self.blocks: int = transformer.get("num_layers", 40)
        temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
        self.latent_shape: tuple[int, int, int, int] = (
            transformer.get("in_channels", 16),
            (self.frames - 1) // temporal + 1,
            self.height // spatial,
            self.width // spatial,
        )
        self.heads: int = transformer.get("num_attention_heads", 40)
        patch = transformer.get("patch_size", (1, 2, 2))
        self.tokens: int = math.prod(size // p for size, p in zip(self.latent_shape[1:], patch, strict=True))

    @cached_property
    def hash(self) -> str:
        """sha256 over the sorted sha256 of the components' weight files."""
        return combined_hash(path for component in COMPONENTS for path in weight_files(self.folder / component))

    @cached_property
    def encoder_hash(self) -> str:
        """As :attr:`hash`, over VAE and text encoder only: what latents and embeddings depend on."""
        return combined_hash(path for part in ("vae", "text_encoder") for path in weight_files(self.folder / part))

    @property
    def storage(self) -> torch.device:
        """Where networks lie between uses: the device, or the CPU with ``offload``."""
        return torch.device("cpu") if self.offload else self.device

    @contextmanager
    def resident(self, *networks: nn.Module) -> Iterator[None]:
        """With ``offload``, keep networks on the device while open; else nothing is moved."""
        moved = networks if self.offload else ()
        try:
            for network in moved:
                network.to(self.device)
            yield
        finally:
            for network in moved:
                network.to(self.storage)

    @cached_property
    def transformer(self) -> WanTransformer3DModel:
        """The teacher's network, frozen, in evaluation mode."""
        return _load(WanTransformer3DModel, self.folder / "transformer", self.storage, torch_dtype=self.dtype)

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        """The VAE, always float32 (lower precision shows), frozen."""
        vae = _load(AutoencoderKLWan, self.folder / "vae", self.storage, torch_dtype=torch.float32)
        if self.vae_tiling:
            vae.enable_tiling()
        return vae

    @cached_property
    def scheduler(self) -> Any:
        """A new scheduler from the folder; its class is named there (UniPC for Wan2.1)."""
        name = read_json(self.folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
        kind = getattr(diffusers, name, None)
        if kind is None:
            raise ConfigError(f"{self.folder / 'scheduler'} names the scheduler {name!r}, which diffusers lacks.")
        return kind.from_pretrained(self.folder / "scheduler")

    @cached_property
    def _text_pipeline(self) -> WanPipeline:
        from transformers import AutoTokenizer, UMT5EncoderModel

        encoder = _load(UMT5EncoderModel, self.folder / "text_encoder", self.storage, dtype=self.dtype)
        return WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True),
            text_encoder=encoder,
            vae=None,
            scheduler=None,
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Caption embeddings (B, text_length, D), zero at padding, by ``WanPipeline``'s own code."""
        pipeline = self._text_pipeline
        with self.resident(pipeline.text_encoder):
            return pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
                device=self.device,
            )[0]

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """As :meth:`encode_prompts`, but what a large text encoder has encoded before is read from disk."""
        cache = self._text_cache
        if cache is None:
            return self.encode_prompts(prompts)
        known = {prompt: cache.get(prompt) for prompt in prompts}
        if lacking := [prompt for prompt, found in known.items() if found is None]:
            for prompt, embedding in zip(lacking, self.encode_prompts(lacking), strict=True):
                cache.put(prompt, embedding)
                known[prompt] = embedding
        return torch.stack([known[prompt].to(self.device) for prompt in prompts])  # type: ignore[union-attr]

    @cached_property
    def _text_cache(self) -> TextCache | None:
        encoder = weight_files(self.folder / "text_encoder")
        if sum(path.stat().st_size for path in encoder) < LARGE_ENCODER:
            return None
        tokenizer = combined_hash(path for path in (self.folder / "tokenizer").iterdir() if path.is_file())
        identity = f"{combined_hash(encoder)} {tokenizer} {self.text_length} {self.dtype}"
        return TextCache(home() / "text", identity, self.text_length)

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        """Normalised latents (B, C, T, H, W): the posterior's mode, (z - latents_mean) / latents_std.

        Args:
            videos: (B, frames, height, width, 3), uint8 or float in [0, 1].
        """
        pixels = videos.to(self.device, torch.float32)
        if not videos.is_floating_point():
            pixels = pixels / 255
        with self.resident(self.vae):
            z = self.vae.encode((pixels * 2 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        mean, std = self._latent_statistics
        return (z - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Videos (B, frames, height, width, 3), uint8 (clamped and rounded), from normalised latents."""
        with self.resident(self.vae):
            return decode_latents(self.vae, latents.to(self.device))

    @property
    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        return latent_statistics(self.vae, self.device)


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents per channel, (1, C, 1, 1, 1) each."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Videos (B, frames, height, width, 3), uint8, clamped and rounded.

    Args:
        vae: in float32, on the latents' device.
        latents: normalised, (B, C, T, H, W).
    """
    mean, std = latent_statistics(vae, latents.device)
    pixels = vae.decode(latents.float() * std + mean).sample
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def micro_folder() -> Path:
    """Where the shipped micro teacher's pipeline lies, or would lie."""
    return Path(str(resources.files("students.micro") / "weights"))


def load_base(
    ref: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    vae_tiling: bool = False,
) -> Base:
    """The base model that ``ref`` names; weights are checked now and loaded when first used.

    Args:
        ref: "micro" (the shipped teacher), a diffusers pipeline folder, or a hub id, with ``@REVISION`` if wanted.
        device: where the networks run.
        dtype: precision of transformer and text encoder; what diffusers keeps in float32 stays so.
        offload: keep networks in the CPU's memory while they do not compute.
        vae_tiling: decode in tiles.

    Raises:
        ConfigError: the folder is not a complete Wan2.1 pipeline in safetensors.
        EnvironmentMissingError: the shipped weights or the hub's files are not here; says how to get them.
    """

    def make(name: str, revision: str | None, folder: Path) -> Base:
        return Base(name, revision, folder, device, dtype, offload=offload, vae_tiling=vae_tiling)

    if ref == "micro":
        folder = micro_folder()
        if not (folder / "model_index.json").is_file():
            raise EnvironmentMissingError(
                f"The micro teacher's weights are not in {folder}; reinstall tmd-eval, or train them with "
                f"python -m students.micro.train_teacher --out {folder}."
            )
        return make("micro", None, folder)
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(f"{path} has no model_index.json, so it is not a diffusers pipeline folder.")
        return make(str(path.resolve()), None, path.resolve())
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", ref)
    if path.exists() or not hub or path.parent.is_dir():
        raise ConfigError(f'There is no folder {ref}, and it is neither "micro" nor a hub id like "owner/name".')
    folder = _download(hub[1], hub[2])
    return make(hub[1], folder.name, folder)


def velocity(transformer: WanTransformer3DModel, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """v(x_t, t) = E[x1 - x given x_t], in the precision of ``x_t``.

    Args:
        transformer: teacher, fake score or plain student.
        x_t: noisy latents (B, C, T, H, W).
        t: times (B,) in [0, 1]; kept in float64 up to the network, which takes 1000 t.
        text: caption embeddings (B, text_length, D).
    """
    dtype = transformer.patch_embedding.weight.dtype
    out = transformer(
        hidden_states=join(transformer, x_t).to(dtype),
        timestep=1000 * t.double(),
        encoder_hidden_states=text.to(dtype),
        return_dict=False,
    )[0]
    return out.to(x_t.dtype)


def guided(v_cond: Tensor, v_uncond: Tensor, w: float) -> Tensor:
    """Classifier-free guidance v_u + w (v_c - v_u); w = 1 is the conditional velocity."""
    return v_uncond + w * (v_cond - v_uncond)


def clean(x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """The clean estimate g = x_t - t v, with times (B,) in [0, 1]."""
    return x_t - t.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)) * v


def features(
    transformer: WanTransformer3DModel, x_t: Tensor, t: Tensor, text: Tensor, blocks: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The velocity, and the outputs of some blocks as feature maps; gradients flow through both.

    Args:
        transformer: the teacher, of width D and patch (p_t, p_h, p_w).
        x_t: noisy latents (B, C, T, H, W).
        t: times (B,) in [0, 1].
        text: caption embeddings (B, text_length, D_text).
        blocks: indices of the blocks, 0 to L - 1.

    Returns:
        v, and per index a map (B, D / (p_t p_h p_w), T, H, W).

    Raises:
        ConfigError: an index outside 0 to L - 1.
    """
    count = len(transformer.blocks)
    if wrong := [index for index in blocks if not 0 <= index < count]:
        raise ConfigError(f"Feature block {wrong[0]} does not exist; the transformer has blocks 0 to {count - 1}.")
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda module, arguments, output: seen.__setitem__(index, output)

    handles = [transformer.blocks[index].register_forward_hook(keep(index)) for index in blocks]
    try:
        v = velocity(transformer, x_t, t, text)
    finally:
        for handle in handles:
            handle.remove()
    # Without contiguous(), GroupNorm's backward on the CPU crashes when its input needs no gradient (torch 2.13).
    tokens = {index: gather_tokens(transformer, seen[index]) for index in blocks}
    maps = [unpatchify(tokens[index], x_t.shape[2:], transformer.config.patch_size).contiguous() for index in blocks]
    return v, maps


def _load(kind: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    weight_files(folder)
    try:
        # Loading may be triggered within inference_mode; weights made there could never take part in a backward pass.
        with torch.inference_mode(False):
            model, report = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
            lacking = sorted(report["missing_keys"])  # from_pretrained would go on with random values
            if set(lacking) - TIED or len(lacking) == len(TIED):
                raise ValueError(f"its weights lack {lacking[0]}")
            return model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder} cannot be loaded as {kind.__name__} ({reason}); restore the folder.") from error


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    cache = home() / "hub"
    patterns = ["*.json", "*.safetensors", "tokenizer/*"]
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(f"There is no folder {name}, and the hub has no such model or revision.") from error
    except Exception as error:  # no network, offline mode, interrupted download: the remedy is the same
        at = f" --revision {revision}" if revision else ""
        raise EnvironmentMissingError(
            f"There is no folder {name}, and the hub's model of that name is not in {cache} and cannot be fetched now "
            f"({type(error).__name__}); with a network, run hf download {name}{at} --cache-dir {cache}, "
            "or give a local pipeline folder."
        ) from error
