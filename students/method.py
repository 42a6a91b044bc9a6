"""What the trainer knows of a distillation method: its networks, whose turn it is, its weighted losses, what it costs.

A method is a class with the members of :class:`Method`; :class:`MethodKind` says how to make one from its settings and
how its student is sampled. docs/your-own-student.md shows one from beginning to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One mini-batch of training pairs."""

    latents: Tensor
    """Normalised clean latents x, float, (B, C, T, H, W)."""
    text: Tensor
    """Prompt embeddings, zeros at padding, (B, text_length, D)."""


class Pairs(Protocol):
    """A source of training pairs, such as :class:`students.data.LatentShards`."""

    hash: str
    """sha256 that changes with the content."""

    def draw(self, seed: int, iteration: int, batch: int, part: slice) -> Batch:
        """Some of the pairs of one iteration's global batch, as a pure function of the arguments.

        Args:
            seed: The run's.
            iteration: Counts from 1.
            batch: Size of the global batch.
            part: Which of its positions.
        """
        ...


class Method(Protocol):
    """A distillation method as the trainer drives it; the negative prompt's embedding is given at construction."""

    networks: dict[str, nn.Module]
    """Trainable networks by name, among "student", "fake_score" and "discriminator"; each gets its own optimiser.

    A method that uses the teacher keeps it as ``teacher``: the trainer places what it finds there on the device, shards
    it and stores it in low precision, and sends a teacher that it does not find to the CPU.
    """

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


class Cost(NamedTuple):
    """Transformer blocks run for one training pair; embeddings, output layers and discriminators are not counted."""

    forwards: float = 0.0
    """Block forwards. A forward-mode derivative counts 2: value and tangent."""
    backwards: float = 0.0
    """Block backwards. Through frozen weights a backward counts one half: the gradients of the weights are left out.
    Gradient checkpointing, which repeats forwards to save memory, is not counted."""

    @property
    def total(self) -> float:
        """Forwards plus twice the backwards, in forwards of one block."""
        return self.forwards + 2 * self.backwards

    def plus(self, other: Cost) -> Cost:
        """Sum of two costs."""
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def times(self, factor: float) -> Cost:
        """Cost of so many repetitions."""
        return Cost(self.forwards * factor, self.backwards * factor)


class Shape(NamedTuple):
    """What the cost of an iteration depends on beside the method's settings."""

    blocks: int
    """L."""
    h: int | None
    """H; None for a plain student."""


@dataclass(frozen=True, kw_only=True)
class MethodKind:
    """How the trainer makes a method from its settings, and what ``student.json`` says of its student.

    The functions get the method's settings, an instance of ``config``.
    """

    label: str
    """Name of the method in ``student.json`` and in tables."""
    config: type
    """Frozen dataclass of the settings: the section ``method`` of the YAML file."""
    build: Callable[[Any, WanTransformer3DModel, Tensor, Any], Method]
    """(student, frozen teacher, embedding of the negative prompt (1, text_length, D), settings) -> the method. Networks
    come before they are placed, also on the meta device (plans, sharding): make others from them by ``copy.deepcopy``
    or with weights of their own, and do not read values."""
    sampling: Callable[[Any], dict[str, Any]]
    """Settings -> those fields of :class:`students.spec.StudentSpec` that say how the student is sampled: ``m``,
    ``sampler`` and ``gamma_outer`` or ``outer_grid``, with a flow head also ``n`` and ``gamma_inner``."""
    cost: Callable[[Any, int, Shape], Cost]
    """(settings, iteration from 1, shape) -> expected cost of the iteration, for one training pair."""
    differentiates: bool = False
    """True if the student also runs outside autocast, for finite differences: in sharded bf16 runs its flow head, or
    all of a plain student, is then gathered in float32."""
    flow_head: bool = False
    """True for TMD students; else the student is a whole Wan transformer that starts as a copy of the teacher."""
    parents: tuple[str, ...] | None = None
    """Labels of the students that a run may start from in ``parent``; None: any of the same shape."""
    prepare: Callable[..., Pairs] | None = None
    """(settings, base model, pairs, ranks, progress) -> what to train on instead of the pairs, made on first use; see
    :func:`students.kd.open_trajectories`. None: the pairs themselves."""
    setup_cost: Callable[[Any, Shape], Cost] | None = None
    """(settings, shape) -> cost of all that ``prepare`` makes; None: nothing."""


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
