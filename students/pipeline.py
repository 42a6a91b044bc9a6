"""A TMD student as a diffusers pipeline; ``TMDPipeline.from_pretrained`` loads what ``tmd-eval ckpt export`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from students.base import decode_latents
from students.errors import ConfigError
from students.sampling import VideoNoise, sample_tmd
from students.times import grid
from students.tmd import TMDStudent


@dataclass
class TMDPipelineOutput(BaseOutput):
    """What :class:`TMDPipeline` returns."""

    frames: Tensor | np.ndarray[Any, Any]
    """Videos (B, frames, height, width, 3), uint8, on the CPU; latents (B, C, T, H, W) for ``output_type="latent"``."""


class TMDPipeline(DiffusionPipeline):
    """Text to video with a TMD student (Algorithm 1): M runs of the main backbone, N of the flow head for each.

    There is no scheduler and no guidance: times stand in ``tmd_config``, and guidance is built into the student.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5.
        vae: Wan's VAE; keep it in float32.
        transformer: the student.
        tmd_config: ``m``, ``n``, ``outer_grid``, ``inner_grid``, ``gamma_outer``, ``gamma_inner``, ``text_length``,
            ``frames``, ``height``, ``width``, ``fps``.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: AutoencoderKLWan,
        transformer: TMDStudent,
        tmd_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tmd_config is None:
            raise ConfigError("TMDPipeline needs tmd_config; load a folder that tmd-eval ckpt export wrote.")
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer)
        self.register_to_config(tmd_config=tmd_config)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        m: int | None = None,
        n: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        output_type: str = "np",
    ) -> TMDPipelineOutput:
        """Make videos; the same seed gives the same video in any batch and in tmd-eval itself.

        Args:
            prompt: one caption or several.
            seed: one per caption; a single number counts up from there.
            m: M, outer steps, by default as trained.
            n: N, inner steps, by default as trained.
            height: pixels, by default the base model's.
            width: pixels.
            num_frames: frames, one more than a multiple of the VAE's temporal factor.
            output_type: "np" (uint8 array), "pt" (uint8 tensor) or "latent".

        Raises:
            ConfigError: a size that the VAE cannot make, or not one seed per prompt.
        """
        config = dict(self.config.tmd_config)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts come with {len(seeds)} seeds; give one seed per prompt.")
        shape = self._latent_shape(num_frames or config["frames"], height or config["height"], width or config["width"])
        device = self._execution_device
        wan = WanPipeline(tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=None, scheduler=None)
        text = wan.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=config["text_length"], device=device
        )[0]
        noise = VideoNoise(seeds, shape)
        outer = _points(m, config["m"], config["outer_grid"], config["gamma_outer"])
        inner = _points(n, config["n"], config["inner_grid"], config["gamma_inner"])
        latents = sample_tmd(self.transformer, text, noise.draw().to(device), outer, inner, noise.draw)
        frames = (latents if output_type == "latent" else decode_latents(self.vae, latents)).cpu()
        self.maybe_free_model_hooks()
        return TMDPipelineOutput(frames=frames.numpy() if output_type == "np" else frames)

    def _latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        temporal, spatial = self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial
        p_t, p_h, p_w = self.transformer.patch
        latent = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
        if (frames - 1) % temporal or height % (spatial * p_h) or width % (spatial * p_w) or latent[0] % p_t:
            raise ConfigError(
                f"{frames} frames of {height}x{width} do not fit: frames are one more than a multiple of {temporal}, "
                f"height a multiple of {spatial * p_h}, width of {spatial * p_w}."
            )
        return (self.transformer.config.transformer["in_channels"], *latent)


def _points(steps: int | None, trained: int, points: Sequence[float], gamma: float) -> Tensor:
    if steps is None or steps == trained:
        return torch.tensor(list(points), dtype=torch.float64)
    return grid(steps, gamma)
