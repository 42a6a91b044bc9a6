"""Bytes that one update needs beside weights, gradients and optimiser, counted without any memory.

The run's own losses and their backward pass run on torch's meta device, where tensors have shapes but no values, while
every storage that comes to life and dies is counted; the most alive at once is the answer. So whatever a method does is
in the figure: which passes keep a graph, gradient checkpointing, the rollout of the flow head.

A step of a full-size network takes minutes on the meta device, but memory grows by the same amount with every block of
the backbone and of the head: three shallow networks of the true width give the figure of any depth.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, WanTransformer3DModel
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.build import new_student
from students.config import TrainConfig
from students.kd import KDConfig, Trajectories
from students.method import Batch, Method, Shape
from students.parallel import store_low
from students.tmd import TMDStudent


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while open, and the most that were alive at once.

    Args:
        device: type of the device whose tensors count.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage())
        return out

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Leave out storages that were there before, such as weights and gradients."""
        for tensor in tensors:
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

    def lap(self) -> int:
        """The most alive at once since the last call, or since the start."""
        most, self.peak = self.peak, self.now
        return most

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


_plain_attention = F.scaled_dot_product_attention


def _fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    try:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    except NotImplementedError:  # forward-mode derivatives take plain attention, here as on a GPU
        return _plain_attention(query, key, value)


class _Autocast:
    """Autocast's place on the meta device, which has none: networks lie in bf16 already, and leave it where a run does.

    Args:
        wide: float32 stand-ins of the parameters, by which passes outside autocast compute.
    """

    def __init__(self, wide: dict[nn.Parameter, Tensor]) -> None:
        self.wide = wide

    @contextmanager
    def __call__(self, device: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Iterator[None]:
        if enabled:
            yield
            return
        narrow = {parameter: parameter.data for parameter in self.wide}
        for parameter, data in self.wide.items():
            parameter.data = data
        try:
            yield
        finally:
            for parameter, data in narrow.items():
                parameter.data = data


@contextmanager
def without_values(networks: Iterable[nn.Module] = ()) -> Iterator[list[Tensor]]:
    """What a pass on the meta device needs, where torch has no rule of its own.

    Fused attention, which keeps O(S) as GPUs do instead of the S x S matrix of torch's fallback; masks, whose count
    nobody knows, that take every sample; and, for autocast, which the meta device lacks, networks that lie in bf16 but
    compute in float32 where the method leaves autocast.

    Args:
        networks: in bf16.

    Yields:
        The float32 stand-ins of their weights, which a real run has instead.
    """
    masks = shape_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    low = [p for network in networks for p in network.parameters() if p.dtype == torch.bfloat16]
    wide = {p: torch.empty_like(p, dtype=torch.float32, requires_grad=False) for p in low}
    with (
        masks,
        patch.object(F, "scaled_dot_product_attention", _fused),
        patch.object(torch, "autocast", _Autocast(wide)),
        patch.object(torch, "is_autocast_enabled", lambda *device: bool(wide)),
    ):
        yield list(wide.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What activations depend on beside the configuration."""

    transformer: dict[str, Any]
    """Config of the teacher's transformer."""
    latent: tuple[int, int, int, int]
    """(C, T, H, W)."""
    text_length: int
    """Tokens of a caption."""


def build(config: TrainConfig, sizes: Sizes, device: str) -> tuple[Method, WanTransformer3DModel]:
    """Networks of the run in the precision they compute in, with random weights (none on the meta device).

    Args:
        config: the run.
        sizes: of the base model.
        device: "meta", or a real one.
    """
    with torch.device(device):
        teacher = WanTransformer3DModel.from_config(sizes.transformer).eval().requires_grad_(False)
        student = new_student(config, teacher).to(device)
        negative = torch.zeros(1, sizes.text_length, sizes.transformer["text_dim"])
        method = config.kind.build(student, teacher, negative, config.method)
    for network in (*method.networks.values(), teacher):
        network.to(device)
        if config.precision == "bf16":
            store_low(network)
        if config.gradient_checkpointing and isinstance(network, ModelMixin):
            network.enable_gradient_checkpointing()
        if config.parallel.checkpoint_head and isinstance(network, TMDStudent):
            network.head_checkpointing = True
    return method, teacher


def blank_batch(config: TrainConfig, sizes: Sizes, device: str) -> Batch:
    """One pair of zeros, or the kind of batch that the method trains on."""
    latents = torch.zeros(1, *sizes.latent, device=device)
    text = torch.zeros(1, sizes.text_length, sizes.transformer["text_dim"], device=device)
    if isinstance(config.method, KDConfig):
        times = torch.linspace(0.999, 0.2, 5, dtype=torch.float64)
        return Trajectories(
            latents=latents, text=text, points=latents[:, None].expand(-1, 5, *sizes.latent), times=times
        )
    return Batch(latents=latents, text=text)


def costliest_turns(config: TrainConfig, method: Method, blocks: int) -> dict[tuple[str, ...], int]:
    """For every kind of turn that the run has, its iteration of most block passes: the one with all terms of the loss.

    A warm-up may leave terms out for thousands of iterations, so the first turn of a kind does not stand for the rest.
    """
    shape = Shape(blocks=blocks, h=config.student.h if config.kind.flow_head else None)
    most: dict[tuple[str, ...], tuple[float, int]] = {}
    for iteration in range(1, config.iterations + 1):
        turn, cost = method.turn(iteration), config.kind.cost(config.method, iteration, shape).total
        if turn not in most or cost > most[turn][0]:
            most[turn] = cost, iteration
    return {turn: iteration for turn, (_, iteration) in most.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that one pass of one pair needs beside weights and gradients."""

    forward: int
    """The most alive at once until the loss is there."""
    backward: int
    """The most alive at once after that."""
    late: int
    """The most alive at once from the first gradient of a block on. :func:`activation_bytes` gives it without what was
    stored block by block, as that is gone when all gradients are there."""

    @property
    def peak(self) -> int:
        """The most alive at once."""
        return max(self.forward, self.backward)


def update_bytes(config: TrainConfig, sizes: Sizes, device: str = "meta") -> dict[tuple[str, ...], Activations]:
    """Bytes of one pass for every kind of turn, counted in full.

    Args:
        config: the run.
        sizes: of the base model.
        device: "meta", or a real one to compute with.

    Returns:
        By the names of the networks that move.
    """
    method, teacher = build(config, sizes, device)
    batch = blank_batch(config, sizes, device)
    for network in method.networks.values():
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
    turns = costliest_turns(config, method, sizes.transformer["num_layers"])
    return {turn: _turn_bytes(method, teacher, batch, turn, iteration) for turn, iteration in turns.items()}


def _turn_bytes(
    method: Method, teacher: nn.Module, batch: Batch, turn: tuple[str, ...], iteration: int
) -> Activations:  # fmt: skip
    networks = (teacher, *method.networks.values())
    device = batch.latents.device.type
    live = LiveBytes(device)
    live.know(p for network in networks for p in network.parameters())
    live.know(p.grad for network in networks for p in network.parameters() if p.grad is not None)
    shapes: AbstractContextManager[list[Tensor]] = nullcontext([])
    if device == "meta":
        shapes = without_values(networks)
    laps: list[int] = []
    with shapes as wide, live, _at_first_block_gradient(method, turn, lambda: laps.append(live.lap())):
        live.know(wide)
        losses = method.losses(batch, iteration, torch.Generator().manual_seed(0))
        forward = live.lap()
        torch.stack([loss.double() for loss in losses.values()]).sum().backward()
        late = live.lap()
    return Activations(forward=forward, backward=max([*laps, late]), late=late)


@contextmanager
def _at_first_block_gradient(method: Method, turn: tuple[str, ...], call: Callable[[], object]) -> Iterator[None]:
    """Call once, when the backward pass has left the loss and reached the first block of a network that moves."""
    reached = False

    def first(_: Tensor) -> None:
        nonlocal reached
        if not reached:
            reached = True
            call()

    hooks = [
        parameter.register_post_accumulate_grad_hook(first)
        for name in turn
        for place, parameter in method.networks[name].named_parameters()
        if "blocks." in place and parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


DEPTHS = ((3, 1), (5, 1), (3, 2))
"""(blocks of the backbone, H) that are counted; a plain student's are their sums."""


def activation_bytes(config: TrainConfig, sizes: Sizes) -> dict[tuple[str, ...], Activations]:
    """As :func:`update_bytes` at full depth, from shallow networks of the true width.

    Args:
        config: the run.
        sizes: of the base model.
    """
    blocks = sizes.transformer["num_layers"]
    head = config.student.h if config.kind.flow_head else 0
    depths = DEPTHS if config.kind.flow_head else ((4, 0), (6, 0))
    counted = []
    for backbone, h in depths:
        shallow = dataclasses.replace(sizes, transformer={**sizes.transformer, "num_layers": backbone + h})
        student = dataclasses.replace(config.student, h=max(h, 1))
        method = config.method
        if getattr(method, "feature_blocks", None) is not None:
            method = dataclasses.replace(method, feature_blocks=None)
        counted.append(update_bytes(dataclasses.replace(config, student=student, method=method), shallow))

    def at_depth(values: list[int], backbone: int, h: int) -> int:
        per_block = (values[1] - values[0]) / (depths[1][0] - depths[0][0])
        per_head = values[2] - values[0] if config.kind.flow_head else 0
        return max(round(values[0] + per_block * (backbone - depths[0][0]) + per_head * (h - depths[0][1])), 0)

    return {
        turn: Activations(
            forward=at_depth([c[turn].forward for c in counted], blocks - head, head),
            backward=at_depth([c[turn].backward for c in counted], blocks - head, head),
            late=at_depth([c[turn].late for c in counted], 0, 0),
        )
        for turn in counted[0]
    }
