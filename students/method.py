"""What the trainer knows of a distillation method: its networks, whose turn it is, and its weighted losses."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One mini-batch of training pairs."""

    latents: Tensor
    """Normalised clean latents x, float, (B, C, T, H, W)."""
    text: Tensor
    """Prompt embeddings, zeros at padding, (B, text_length, D)."""


class Method(Protocol):
    """A distillation method as the trainer drives it; the negative prompt's embedding is given at construction."""

    networks: dict[str, nn.Module]
    """Trainable networks by name, among "student", "fake_score" and "discriminator"; each gets its own optimiser."""

    def turn(self, iteration: int) -> tuple[str, ...]:
        """Name the networks that move at this iteration.

        Args:
            iteration: Counts from 1.
        """
        ...

    def losses(self, batch: Batch, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the terms to minimise; gradients reach only the networks whose turn it is.

        Args:
            batch: Training pairs on the networks' device.
            iteration: Counts from 1.
            generator: Source of every random draw, so that a resumed run repeats itself to the bit.

        Returns:
            Named scalars, already weighted: the trainer back-propagates their sum.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Figures worth logging from the latest call of losses, the fusion gate among them."""
        ...


def draw_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise on the generator's device, so that a CPU seed gives the same noise on any device.

    Args:
        like: Gives shape, dtype and device.
        generator: Source of the draw.
    """
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise.to(like)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Give a time per sample the shape that multiplies a latent, in float64 on the latent's device.

    Args:
        t: (B,).
        like: (B, ...).
    """
    return t.to(like.device, torch.float64).view(-1, *[1] * (like.ndim - 1))


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point on the straight path, (1 - t) clean + t noise, computed in float64 and returned in clean's dtype.

    Args:
        clean: Data end, (B, ...).
        noise: Noise end, same shape.
        t: Time per sample in [0, 1], 0 = data, (B,).
    """
    time = per_sample(t, clean)
    return ((1 - time) * clean.double() + time * noise.double()).to(clean.dtype)


def gate_metric(student: nn.Module) -> dict[str, float]:
    """Share of the inner sample in the gated fusion, sigmoid(a), as {"gate": ...}; empty for a student without a gate.

    Args:
        student: A TMDStudent, or any other network.
    """
    gate = getattr(student, "gate_parameter", None)
    return {} if gate is None else {"gate": float(torch.sigmoid(gate.detach().double()))}
