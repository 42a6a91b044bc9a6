"""Plan before you pay: parameters, operations and memory a GPU of a training run, from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from students.base import micro_folder
from students.config import TrainConfig
from students.errors import ConfigError
from students.facts import Facts, read_facts
from students.machine import home
from students.method import Shape
from students.parallel import kept
from tmd_eval.plan_activations import Sizes, activation_bytes, build

RESERVE = 0.08
"""Share of a GPU's memory left to the CUDA context, communication buffers and the allocator's fragments."""
WAN: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Shapes of Wan2.1, so that a plan needs no download."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU by part, at the costliest turn of an update."""

    turn: tuple[str, ...]
    """Networks that move at that turn."""
    weights: dict[str, int]
    """By network, the frozen teacher among them."""
    gathered: int
    """Working copies: whole blocks of sharded networks, or bf16 copies under autocast."""
    gradients: int
    """Of the networks that move, with the copy that data parallelism exchanges."""
    optimiser: int
    """AdamW's two moments of all networks."""
    average: int
    """Moving average of the student."""
    activations: int
    """All else that is alive at once in forward and backward passes."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        rest = (self.gathered, self.gradients, self.optimiser, self.average, self.activations)
        return sum(self.weights.values()) + sum(rest)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes."""

    config: TrainConfig
    """The run."""
    gpus: int
    """Ranks."""
    parameters: dict[str, int]
    """By network, the frozen teacher among them."""
    flops_forward: float
    """Of one forward pass of the teacher on one sample."""
    flops_iteration: float
    """Of one iteration over the whole batch, averaged over the run; without repeated forwards."""
    flops_setup: float
    """Of what is made once before it, such as a KD warm-up's trajectories."""
    memory: Memory
    """Of one GPU."""

    def fits(self, gpu_memory: float) -> bool:
        """True if a GPU of so many GiB holds it, with RESERVE to spare."""
        return self.memory.total <= gpu_memory * 2**30 * (1 - RESERVE)


def sizes_of(base: str) -> Sizes:
    """Shapes of a base model; those of Wan2.1 are known here, others are read from their folder or the hub's cache.

    Raises:
        ConfigError: the base model is neither.
    """
    name, _, revision = base.partition("@")
    facts = Facts()
    compression = (4, 8)
    if name in WAN:
        stated: dict[str, Any] = WAN[name]
    else:
        folder = str(micro_folder()) if base == "micro" else name
        where: dict[str, Any] = {"revision": revision or None, "cache_dir": home() / "hub", "local_files_only": True}
        try:
            stated = WanTransformer3DModel.load_config(folder, subfolder="transformer", **where)
            vae = AutoencoderKLWan.load_config(folder, subfolder="vae", **where)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The base model {base} is not here, so its shape is unknown; give a local pipeline folder as base, or "
                f"one of {', '.join(WAN)}."
            ) from error
        compression = (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8))
        if Path(folder).is_dir():
            facts = read_facts(Path(folder))
    defaults = {
        "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
        "freq_dim": 256, "cross_attn_norm": True,
    }  # fmt: skip
    shape = {**defaults, **{key: value for key, value in stated.items() if not key.startswith("_")}}
    temporal, spatial = compression
    latent = (shape["in_channels"], (facts.frames - 1) // temporal + 1, facts.height // spatial, facts.width // spatial)
    return Sizes(transformer=shape, latent=latent, text_length=facts.text_length)


def tokens_of(sizes: Sizes) -> int:
    """S, tokens of one sample."""
    return math.prod(side // p for side, p in zip(sizes.latent[1:], sizes.transformer["patch_size"], strict=True))


def block_flops(sizes: Sizes) -> float:
    """Operations (two a multiply-add) of one Wan block on one sample: projections, attention, MLP.

    Self-attention 8 S D^2 + 4 S^2 D, cross-attention 4 S D^2 + 4 T D^2 + 4 S T D, MLP 4 S D F: S tokens of width D,
    T tokens of text and an MLP of width F.
    """
    shape, s, t = sizes.transformer, tokens_of(sizes), sizes.text_length
    d = shape["num_attention_heads"] * shape["attention_head_dim"]
    return 8 * s * d**2 + 4 * s**2 * d + 4 * s * d**2 + 4 * t * d**2 + 4 * s * t * d + 4 * s * d * shape["ffn_dim"]


def make_plan(config: TrainConfig, gpus: int, sizes: Sizes | None = None) -> Plan:
    """The plan of a run.

    Args:
        config: the run.
        gpus: ranks.
        sizes: of the base model; None: :func:`sizes_of`.

    Raises:
        ConfigError: the base model is unknown, or the batch or the layout does not suit the GPUs.
    """
    sizes = sizes or sizes_of(config.base)
    blocks = sizes.transformer["num_layers"]
    config.check_base(blocks)
    config.parallel.check(gpus, sizes.transformer["num_attention_heads"], tokens_of(sizes))
    pairs, _ = config.passes(gpus // config.parallel.context)
    method, teacher = build(config, sizes, "meta")
    networks: dict[str, nn.Module] = {"teacher": teacher, **method.networks}
    shape = Shape(blocks=blocks, h=config.student.h if config.kind.flow_head else None)
    cost = sum(config.kind.cost(config.method, i, shape).total for i in range(1, config.iterations + 1))
    setup = config.kind.setup_cost(config.method, shape).total if config.kind.setup_cost else 0.0
    one = block_flops(sizes)
    counted = activation_bytes(config, sizes)
    memories = [
        _memory(config, gpus, networks, turn, round(live * pairs / config.parallel.context))
        for turn, live in counted.items()
    ]
    return Plan(
        config=config, gpus=gpus,
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        flops_forward=one * blocks, flops_iteration=one * cost / config.iterations * config.batch,
        flops_setup=one * setup, memory=max(memories, key=lambda memory: memory.total),
    )  # fmt: skip


def _memory(
    config: TrainConfig, gpus: int, networks: dict[str, nn.Module], turn: tuple[str, ...], activations: int
) -> Memory:
    sharded = config.parallel.shard == "fsdp" and gpus > 1
    shards = (config.parallel.shard_ranks or gpus) if sharded else 1
    low = config.precision == "bf16"
    trained = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    del trained["teacher"]
    weights = {"teacher": _stored(networks["teacher"], low, shards)}
    weights |= {name: round(4 * count / shards) for name, count in trained.items()}
    moving = sum(trained[name] for name in turn)
    exchange = max(trained[name] for name in turn) if gpus > 1 and not sharded else 0
    if sharded:  # a block and the next one of the widest network, and a flow head that stays
        width = {name: 2 if low else 4 for name in networks}
        outer = dict(width)
        if config.kind.differentiates:  # also runs outside autocast: a plain student, or the head and outer layers
            outer["student"] = 4
            width["student"] = width["student"] if config.kind.flow_head else 4
        gathered = 2 * max(width[name] * _block(network) for name, network in networks.items())
        gathered += max(outer[name] * _kept_gathered(network) for name, network in networks.items())
    else:  # autocast keeps a bf16 copy of what it multiplies until the backward pass is over
        gathered = 2 * moving if low else 0
    return Memory(
        turn=turn, weights=weights, gathered=gathered, gradients=round(4 * moving / shards) + 4 * exchange,
        optimiser=round(8 * sum(trained.values()) / shards),
        average=round(4 * trained["student"] / shards) if config.ema else 0, activations=activations,
    )  # fmt: skip


def _stored(teacher: nn.Module, low: bool, shards: int) -> int:
    """Bytes of the frozen teacher: bf16 but for what stays float32, or float32."""
    sizes = ((4 if kept(teacher, name) or not low else 2) * p.numel() for name, p in teacher.named_parameters())
    return round(sum(sizes) / shards)


def _sharded_blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks that are gathered one by one; a student's flow head is not among them, as it stays gathered."""
    found: list[nn.Module] = []
    for name in ("blocks", "backbone_blocks"):
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList):  # a TMD student's ``blocks`` is a number
            found += blocks
    return found


def _block(network: nn.Module) -> int:
    """Parameters of one block; a network without blocks is gathered whole."""
    first = next(iter(_sharded_blocks(network)), network)
    return sum(p.numel() for p in first.parameters())


def _kept_gathered(network: nn.Module) -> int:
    """Parameters that stay gathered: outer layers, and a flow head; none of a network without blocks."""
    blocks = _sharded_blocks(network)
    within = {id(p) for block in blocks for p in block.parameters()}
    return sum(p.numel() for p in network.parameters() if id(p) not in within) if blocks else 0


def advice(plan: Plan, gpu_memory: float) -> list[tuple[str, Plan]]:
    """Changes that make a run fit, each on top of those before it, up to the first that does.

    Args:
        plan: of a run that does not fit.
        gpu_memory: GiB of one GPU.
    """
    found: list[tuple[str, Plan]] = []
    for what, config, gpus in _steps(plan.config, plan.gpus):
        try:
            found.append((what, make_plan(config, gpus)))
        except ConfigError:
            continue
        if found[-1][1].fits(gpu_memory):
            break
    return found


def _steps(config: TrainConfig, gpus: int) -> Iterator[tuple[str, TrainConfig, int]]:
    parallel = config.parallel
    if config.micro_batch != 1:
        config = dataclasses.replace(config, micro_batch=1)
        yield "micro_batch=1", config, gpus
    if not config.gradient_checkpointing:
        config = dataclasses.replace(config, gradient_checkpointing=True)
        yield "gradient_checkpointing=true", config, gpus
    if config.precision != "bf16":
        config = dataclasses.replace(config, precision="bf16")
        yield "precision=bf16", config, gpus
    if parallel.shard == "none" and gpus > 1:
        parallel = dataclasses.replace(parallel, shard="fsdp")
        config = dataclasses.replace(config, parallel=parallel)
        yield "parallel.shard=fsdp", config, gpus
    if config.kind.flow_head and not parallel.checkpoint_head:
        parallel = dataclasses.replace(parallel, checkpoint_head=True)
        config = dataclasses.replace(config, parallel=parallel)
        yield "parallel.checkpoint_head=true", config, gpus
    for more in (2, 4, 8):
        if config.batch % (gpus * more) == 0:
            both = dataclasses.replace(parallel, shard="fsdp", shard_ranks=None)
            yield (
                f"--gpus {gpus * more} with parallel.shard=fsdp",
                dataclasses.replace(config, parallel=both),
                gpus * more,
            )
