"""Samples of the student while it trains, as a contact sheet: what loss curves of distillation do not show."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from students.base import Base
from students.checkpoint import Checkpoint
from students.data import stream_seed
from students.errors import ConfigError
from students.method import Batch, Pairs
from students.spec import StudentSpec

FRAMES = 4
"""Columns of the sheet for each of the two videos of a row."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Samples of the averaged student beside the data of the same captions, always the same captions and noise."""

    every: int | None = None
    """Iterations between contact sheets, in previews/ and TensorBoard; null: none."""
    count: int = 4
    """Captions, one row each: the first of the data's order."""
    decode: bool = True
    """true: pixels, by the VAE, which is loaded for the moment; false: the three main directions of the latents."""

    def __post_init__(self) -> None:
        for name in ("every", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"preview.{name} must be at least 1, not {value}.")


class Preview:
    """Draws the contact sheets of a run; nothing of it touches the run's random numbers or weights."""

    def __init__(self, config: PreviewConfig, base: Base, data: Pairs, *, low: bool):
        """Take the first pairs of the data.

        Args:
            config: how many, and when.
            base: base model, for its VAE.
            data: where text embeddings come from, so that no text encoder is needed.
            low: sample in bf16, as the run trains.
        """
        assert config.every is not None
        self.config, self.base, self.every, self.low = config, base, config.every, low
        batch: Batch = data.draw(0, 1, config.count, slice(0, config.count))
        self.real, self.text = batch.latents, batch.text

    def sample(self, student: Any, spec: StudentSpec, device: torch.device) -> Tensor:
        """Latents (count, C, T, H, W) of the student for the captions; every rank calls it and gets the same.

        Args:
            student: with the weights to show.
            spec: how it is sampled.
            device: where.
        """
        training = student.training
        checkpoint = Checkpoint("", "preview", "", self.base, spec, student.eval())
        latents = []
        with torch.autocast(device.type, torch.bfloat16, enabled=self.low):
            for row, text in enumerate(self.text.split(1)):
                seed = stream_seed("preview", row)
                latents.append(checkpoint.latents(text.to(device), text.to(device), [seed]))
        student.train(training)
        return torch.cat(latents).float()

    def sheet(self, latents: Tensor) -> np.ndarray:
        """Pixels (height, width, 3), uint8: a row per caption, left the data, right the sample, frames spread evenly.

        Args:
            latents: of :meth:`sample`.
        """
        if self.config.decode:
            decoder = copy.copy(self.base)  # so that the VAE goes when this function ends
            videos = [
                torch.cat([decoder.decode(item) for item in part.split(1)]) for part in (self.real, latents.cpu())
            ]
        else:
            videos = list(main_directions(self.real, latents.cpu()))
        columns = []
        for part in videos:
            index = torch.linspace(0, part.shape[1] - 1, FRAMES).round().long()
            columns += list(part[:, index].unbind(1))
        return torch.cat([torch.cat(row, dim=1) for row in zip(*columns, strict=True)]).cpu().numpy()


def main_directions(real: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Latents as colours: their three main directions over channels, found and scaled on the real ones.

    Args:
        real: (n, C, T, H, W), C at least 3.
        sampled: same shape.

    Returns:
        Both as (n, T, H, W, 3), uint8.
    """
    values = real.float().transpose(0, 1).flatten(1)
    mean = values.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(values - mean, full_matrices=False).U[:, :3]
    directions = directions * directions.sum(dim=0).sign()  # else the sign is the library's choice
    spread = (directions.T @ (values - mean)).std(dim=1)

    def colour(latents: Tensor) -> Tensor:
        shape = latents.shape
        flat = directions.T @ (latents.float().transpose(0, 1).flatten(1) - mean) / spread[:, None].clamp(min=1e-6)
        pixels = ((flat / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.unflatten(1, (shape[0], *shape[2:])).permute(1, 2, 3, 4, 0)

    return colour(real), colour(sampled)
