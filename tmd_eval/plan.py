"""Plan before you pay: parameters, operations and memory a GPU of a training run, from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
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
from tmd_eval.plan_activations import Activations, Sizes, activation_bytes, build

RESERVE = 0.08
"""Share of a GPU's memory left to the CUDA context, communication buffers and the allocator's fragments."""
WAN: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Shapes of Wan2.1, so that a plan needs no download."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU by part, at one moment of the costliest turn."""

    turn: tuple[str, ...]
    """Networks that move at that turn."""
    moment: str
    """"forward", "backward" or "update"."""
    weights: dict[str, int]
    """By network, the frozen teacher among them."""
    gathered: int
    """Working copies: whole blocks of sharded networks, or bf16 copies under autocast."""
    gradients: int
    """Of the networks that move, as far as they are there."""
    optimiser: int
    """AdamW's two moments of all networks."""
    average: int
    """Moving average of the student."""
    activations: int
    """All else that is alive at once: in a pass, or AdamW's intermediate and what data parallelism exchanges."""

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


class Counts(dict[Any, tuple[dict[str, nn.Module], dict[tuple[str, ...], Activations]]]):
    """Networks and counted activations by the settings in which plans of one run differ; a count takes many seconds."""

    def of(self, config: TrainConfig, sizes: Sizes) -> tuple[dict[str, nn.Module], dict[tuple[str, ...], Activations]]:
        """Networks on the meta device by name, and :func:`tmd_eval.plan_activations.activation_bytes`."""
        key = config.precision, config.gradient_checkpointing, config.parallel.checkpoint_head
        if key not in self:
            method, teacher = build(config, sizes, "meta")
            self[key] = {"teacher": teacher, **method.networks}, activation_bytes(config, sizes)
        return self[key]


def make_plan(config: TrainConfig, gpus: int, sizes: Sizes | None = None, counts: Counts | None = None) -> Plan:
    """The plan of a run.

    Args:
        config: the run.
        gpus: ranks.
        sizes: of the base model; None: :func:`sizes_of`.
        counts: of other plans of this run.

    Raises:
        ConfigError: the base model is unknown, or the batch or the layout does not suit the GPUs.
    """
    sizes = sizes or sizes_of(config.base)
    blocks = sizes.transformer["num_layers"]
    config.check_base(blocks)
    config.parallel.check(gpus, sizes.transformer["num_attention_heads"], tokens_of(sizes))
    pairs, passes = config.passes(gpus // config.parallel.context)
    networks, counted = (Counts() if counts is None else counts).of(config, sizes)
    shape = Shape(blocks=blocks, h=config.student.h if config.kind.flow_head else None)
    cost = sum(config.kind.cost(config.method, i, shape).total for i in range(1, config.iterations + 1))
    setup = config.kind.setup_cost(config.method, shape).total if config.kind.setup_cost else 0.0
    one = block_flops(sizes)
    memories = [
        memory
        for turn, live in counted.items()
        for memory in _moments(config, gpus, networks, turn, live, pairs, passes > 1)
    ]
    return Plan(
        config=config, gpus=gpus,
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        flops_forward=one * blocks, flops_iteration=one * cost / config.iterations * config.batch,
        flops_setup=one * setup, memory=max(memories, key=lambda memory: memory.total),
    )  # fmt: skip


def _moments(
    config: TrainConfig, gpus: int, networks: dict[str, nn.Module], turn: tuple[str, ...], live: Activations,
    pairs: int, accumulates: bool,
) -> Iterator[Memory]:  # fmt: skip
    """The moments of a turn at which most may be alive.

    The trainer drops gradients before every update, so with one pass there are none before the backward pass makes
    them, while it frees what the forward pass stored: either its start or its end is the most.
    """
    sharded = config.parallel.shard == "fsdp" and gpus > 1
    shards = (config.parallel.shard_ranks or gpus) if sharded else 1
    low = config.precision == "bf16"
    trained = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    del trained["teacher"]
    weights = {"teacher": _stored(networks["teacher"], low, shards)}
    weights |= {name: round(4 * count / shards) for name, count in trained.items()}
    moving = sum(trained[name] for name in turn)
    gathered = _gathered(config, networks, turn, sharded)
    gradients = round(4 * moving / shards)
    before = gradients if accumulates else 0
    share = pairs / config.parallel.context
    # AdamW takes the root of one network's second moments at once; an exchange of whole gradients is as large
    update = round(4 * max(trained[name] for name in turn) / shards)
    for moment, copies, grads, rest in (
        ("forward", gathered, before, round(live.forward * share)),
        ("backward", gathered, before, round(live.backward * share)),
        ("backward", gathered if sharded else 0, gradients, round(live.late * share)),
        ("update", 0, gradients, update),
    ):
        yield Memory(
            turn=turn, moment=moment, weights=weights, gathered=copies, gradients=grads, activations=rest,
            optimiser=round(8 * sum(trained.values()) / shards),
            average=round(4 * trained["student"] / shards) if config.ema else 0,
        )  # fmt: skip


def _gathered(config: TrainConfig, networks: dict[str, nn.Module], turn: tuple[str, ...], sharded: bool) -> int:
    """Bytes of working copies in a pass."""
    low = config.precision == "bf16"
    if not sharded:  # autocast keeps a bf16 copy of what it multiplies until the backward pass has used it
        return 2 * sum(p.numel() for name in turn for p in networks[name].parameters()) if low else 0
    # a block and the next one of the widest network, and a flow head that stays
    width = {name: 2 if low else 4 for name in networks}
    outer = dict(width)
    if config.kind.differentiates:  # also runs outside autocast: a plain student, or the head and outer layers
        outer["student"] = 4
        width["student"] = width["student"] if config.kind.flow_head else 4
    blocks = 2 * max(width[name] * _block(network) for name, network in networks.items())
    return blocks + max(outer[name] * _kept_gathered(network) for name, network in networks.items())


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


@dataclass(frozen=True, kw_only=True)
class Change:
    """One setting that takes memory off a GPU."""

    text: str
    """As it is written on the command line."""
    config: Callable[[TrainConfig], TrainConfig]
    """The run with it."""
    gpus: int | None = None
    """Other number of ranks."""
    kind: str
    """What it changes."""
    replaces: tuple[str, ...]
    """Kinds of earlier changes whose place it takes."""


def advice(plan: Plan, gpu_memory: float) -> list[tuple[str, Plan]]:
    """The changes that make a run fit, none of them needless; more GPUs only where those at hand cannot do.

    Args:
        plan: of a run that does not fit.
        gpu_memory: GiB of one GPU.

    Returns:
        Changes, each on top of those before it, with the plan after it; the last one fits, if any known here does.
    """
    sizes, counts = sizes_of(plan.config.base), Counts()

    def after(changes: Sequence[Change]) -> Plan | None:
        config, gpus = plan.config, plan.gpus
        for change in changes:
            config, gpus = change.config(config), change.gpus or gpus
        try:
            return make_plan(config, gpus, sizes, counts)
        except ConfigError:  # the batch or the heads cannot be shared so
            return None

    def fits(changes: Sequence[Change]) -> bool:
        found = after(changes)
        return found is not None and found.fits(gpu_memory)

    chosen: list[Change] = []
    for change in _changes(plan.config, plan.gpus):
        trial = [*(other for other in chosen if other.kind not in change.replaces), change]
        if after(trial) is None:
            continue
        chosen = trial
        if fits(chosen):
            break
    if fits(chosen):
        for change in reversed(chosen[:-1]):  # the costliest first
            fewer = [other for other in chosen if other is not change]
            chosen = fewer if fits(fewer) else chosen
    plans = [(change.text, after(chosen[: i + 1])) for i, change in enumerate(chosen)]
    return [(text, found) for text, found in plans if found is not None]


def _changes(config: TrainConfig, gpus: int) -> Iterator[Change]:
    """What may help, the cheapest in time and money first."""
    parallel = config.parallel

    def own(name: str, value: Any) -> Change:
        return Change(
            text=f"{name}={str(value).lower()}", config=lambda run: dataclasses.replace(run, **{name: value}),
            kind=name, replaces=(name,),
        )  # fmt: skip

    def laid_out(name: str, value: Any) -> Change:
        def change(run: TrainConfig) -> TrainConfig:
            return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **{name: value}))

        text = "null" if value is None else str(value).lower()
        return Change(text=f"parallel.{name}={text}", config=change, kind=name, replaces=(name,))

    def context(ranks: int) -> Iterator[Change]:
        for share in (2, 4, 8):
            if share > parallel.context and ranks % share == 0:
                yield laid_out("context", share)

    if config.micro_batch != 1:
        yield own("micro_batch", 1)
    if not config.gradient_checkpointing:
        yield own("gradient_checkpointing", True)
    if config.precision != "bf16":
        yield own("precision", "bf16")
    if parallel.shard == "none" and gpus > 1:
        yield laid_out("shard", "fsdp")
    if config.kind.flow_head and not parallel.checkpoint_head:
        yield laid_out("checkpoint_head", True)
    if parallel.shard_ranks is not None:
        yield laid_out("shard_ranks", None)
    yield from context(gpus)
    for more in (2, 4, 8, 16):
        wide = laid_out("shard", "fsdp")
        text = f"--gpus {gpus * more}" + (f" with {wide.text}" if parallel.shard == "none" else "")
        yield dataclasses.replace(wide, text=text, gpus=gpus * more, kind="gpus", replaces=("gpus", "context"))
        yield from context(gpus * more)
