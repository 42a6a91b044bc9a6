"""Training across GPUs: FSDP2, hybrid sharding, context parallelism and what they ask of the trainer.

Every block is a group of its own, gathered just before it runs. Storage, reduction and optimiser are float32; in bf16
runs the groups are gathered in bf16. What diffusers keeps in float32 stays so: time embedders are float32 groups, and
the small rest (modulation tables, norms, the fusion gate) lies whole on every rank, so that a block stays one group.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from students.distributed import Ranks
from students.errors import ConfigError

ENTRIES = ("backbone", "head")
"""Methods of a student that losses and samplers call beside ``forward``."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is laid out over its ranks."""

    shard: Literal["none", "fsdp"] = "none"
    """none: all weights on every rank (data parallelism); fsdp: weights, gradients, optimisers and averages cut up."""
    shard_ranks: int | None = None
    """Ranks that hold one cut-up copy, usually those of a node; the copies are kept equal (HSDP). Null: all ranks."""
    context: int = 1
    """Ranks that share the tokens of one sample (Ulysses); must divide the teacher's heads and its number of tokens."""
    compile: str | None = None
    """Backend of torch.compile for the transformer blocks, for example inductor; null: none."""
    checkpoint_head: bool = False
    """Recompute the flow head as one piece in the backward pass, so that a rollout keeps one sample per inner step."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"parallel.context must be at least 1, not {self.context}.")
        if self.shard_ranks is not None and (self.shard != "fsdp" or self.shard_ranks < 1):
            raise ConfigError(
                f"parallel.shard_ranks is {self.shard_ranks}; it must be at least 1 and needs parallel.shard fsdp."
            )
        if self.compile is not None and self.compile not in (known := torch.compiler.list_backends(None)):
            raise ConfigError(f"parallel.compile is {self.compile!r}; choose null or one of {', '.join(known)}.")

    def check(self, world: int, heads: int, tokens: int) -> None:
        """Refuse a layout that the ranks or the teacher do not allow.

        Args:
            world: number of ranks.
            heads: attention heads of the teacher.
            tokens: tokens of one sample.

        Raises:
            ConfigError: some number does not divide another.
        """
        for name, value, whole, of in (
            ("shard_ranks", self.shard_ranks or 1, world, "ranks"),
            ("context", self.context, world, "ranks"),
            ("context", self.context, heads, "attention heads"),
            ("context", self.context, tokens, "tokens"),
        ):
            if whole % value:
                raise ConfigError(f"parallel.{name} is {value}, which does not divide the {whole} {of}.")


def kept(network: nn.Module, name: str) -> bool:
    """True for a parameter or module that diffusers keeps in float32 in this network."""
    return not set(getattr(network, "_keep_in_fp32_modules", None) or ()).isdisjoint(name.split("."))


def store_low(network: nn.Module) -> None:
    """Store a frozen network in bf16, but for what diffusers keeps in float32: as ``from_pretrained`` would load it."""
    for name, parameter in network.named_parameters():
        if not kept(network, name):
            parameter.data = parameter.data.to(torch.bfloat16)


def embed_time_in_full(network: nn.Module, device: torch.device) -> None:
    """Take time embedders out of autocast, which would round the sinusoids of 1000 t to bf16 on their way in."""
    for module in network.modules():
        if isinstance(module, TimestepEmbedding):
            module.forward = torch.autocast(device.type, enabled=False)(module.forward)


class Layout:
    """The meshes of a run, and the functions that lay a network out over them."""

    def __init__(self, config: ParallelConfig, ranks: Ranks):
        """Make the meshes; a collective call.

        Args:
            config: how.
            ranks: the processes, with an open process group.
        """
        self.config, self.ranks = config, ranks
        self.sharded = config.shard == "fsdp" and ranks.world > 1
        self.mesh: DeviceMesh | None = None
        self.context: Any = None
        device = ranks.device.type
        if self.sharded and config.shard_ranks in (None, ranks.world):
            self.mesh = init_device_mesh(device, (ranks.world,), mesh_dim_names=("shard",))
        elif self.sharded and config.shard_ranks:
            shape = (ranks.world // config.shard_ranks, config.shard_ranks)
            self.mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        if config.context > 1:
            self.context = self._context_config()

    @property
    def here(self) -> bool:
        """True where networks are built with their weights: everywhere, or when sharding on the main rank only."""
        return self.ranks.main or not self.sharded

    def place(
        self, network: nn.Module, *, low: bool, full: Iterable[nn.Module] = (), keep: Iterable[nn.Module] = ()
    ) -> None:
        """Put a network where it will be trained: on the device, cut up if the run shards.

        Args:
            network: with weights where :attr:`here` holds, else on the meta device.
            low: gather in bf16.
            full: blocks that are gathered in float32 even so; with the network itself, its outer layers.
            keep: blocks that stay gathered between forward and backward, because they run several times.
        """
        device = self.ranks.device
        if low:
            embed_time_in_full(network, device)
        if self.context is not None and isinstance(network, ModelMixin):
            self._split_context(network)
        if self.config.compile and isinstance(network, ModelMixin):
            network.compile_repeated_blocks(backend=self.config.compile)
        if not self.sharded:
            network.to(device)
            return
        weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        buffers = {name: tensor.detach() for name, tensor in network.named_buffers()}
        network.to("meta")
        self._shard(network, low, set(full), set(keep))
        network.to_empty(device=device)
        _broadcast(network, weights, buffers, self.ranks)

    def _shard(self, network: nn.Module, low: bool, full: set[nn.Module], keep: set[nn.Module]) -> None:
        whole = MixedPrecisionPolicy(cast_forward_inputs=False)
        low = low and isinstance(network, ModelMixin)  # group norms of a discriminator want float32
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if low else whole
        # outputs of unpatchify are views, which nothing here changes in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        embedders = [m for m in network.modules() if isinstance(m, TimestepEmbedding)]
        inside = {p for module in embedders for p in module.parameters()}
        ignored = {p for name, p in network.named_parameters() if kept(network, name) and p not in inside}

        def cut(module: nn.Module, policy: MixedPrecisionPolicy, again: bool | None = None) -> None:
            # again None: FSDP's own choice, which is to gather again before backward except for the root
            fully_shard(
                module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=ignored
            )  # fmt: skip

        for embedder in embedders:
            cut(embedder, whole)
        for block in _pieces(network):
            cut(block, whole if block in full else half, block not in keep)
        cut(network, whole if network in full else half)
        for entry in ENTRIES:
            if hasattr(network, entry):
                register_fsdp_forward_method(network, entry)

    def _context_config(self) -> Any:
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ParallelConfig as Parallel

        world, degree = self.ranks.world, self.config.context
        mesh = init_device_mesh(
            self.ranks.device.type, (world // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses")
        )
        parallel = Parallel(context_parallel_config=ContextParallelConfig(ulysses_degree=degree))
        parallel.setup(self.ranks.rank, world, self.ranks.device, mesh=mesh["ring", "ulysses"])
        return parallel

    def _split_context(self, network: ModelMixin) -> None:
        """What ``ModelMixin.enable_parallelism`` does, which asks for an accelerator and so fails on the CPU."""
        from diffusers.hooks.context_parallel import apply_context_parallel
        from diffusers.models.attention import AttentionModuleMixin

        network._parallel_config = self.context
        for module in network.modules():
            if isinstance(module, AttentionModuleMixin):
                module.processor._parallel_config = self.context
        # without the plan of the whole network, which splits a time per token: ours is one per sample
        plan = {name: part for name, part in network._cp_plan.items() if name}
        apply_context_parallel(network, self.context.context_parallel_config, plan)

    def one_stops_all(self, bad: bool) -> bool:
        """True if the passes of this iteration must end here; call before every backward pass.

        Without sharding a rank may end alone. Otherwise the others would wait for it in the backward pass.

        Args:
            bad: this rank cannot go on.
        """
        return bool(self.ranks.largest([float(bad)])[0]) if self.sharded or self.context else bad

    def average_gradients(self, network: nn.Module) -> None:
        """Mean of gradients over data ranks, and zeros for what the losses did not reach.

        FSDP has taken the mean over all ranks during backward for what it holds; the rest is averaged here. Ranks that
        share a sample hold the parts of their tokens, whose sum is wanted, not the mean.
        """
        free_gathered(network)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        self.ranks.average(g for g in grads if not isinstance(g, DTensor))
        if self.context is not None and isinstance(network, ModelMixin):
            torch._foreach_mul_([local(g) for g in grads], float(self.config.context))

    def whole(self, network: nn.Module) -> Any:
        """The network with all its weights, on the main rank; None elsewhere. A collective call."""
        if not self.sharded:
            return network if self.ranks.main else None
        state = whole_state(network, self.ranks.main)
        if not self.ranks.main:
            return None
        cls, config = plain_class(network), network.config
        with torch.device("meta"):
            alone = cls.from_config(config)
        alone.load_state_dict(state, assign=True)
        return alone

    def clip(self, network: nn.Module, limit: float | None) -> Tensor:
        """Scale gradients down to a norm of at most ``limit`` (None: leave them); returns the norm before."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(network.parameters(), limit or math.inf)
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        cut = _square_sum([local(g) for g in grads if isinstance(g, DTensor)], self.ranks.device)
        assert self.mesh is not None
        dist.all_reduce(cut, group=self.mesh["shard"].get_group())
        norm = (cut + _square_sum([g for g in grads if not isinstance(g, DTensor)], self.ranks.device)).sqrt()
        if limit and norm > limit:  # not for inf or nan: the trainer refuses those
            torch._foreach_mul_([local(g) for g in grads], limit / (float(norm) + 1e-6))
        return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a whole or sharded one; no communication.

    Args:
        target: on any device, plain or sharded.
        whole: the same on every rank.
    """
    if isinstance(target, DTensor):
        part = distribute_tensor(
            whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )  # fmt: skip
        local(target).copy_(local(part))
    else:
        target.copy_(whole)


def whole_state(network: nn.Module, main: bool) -> dict[str, Tensor]:
    """The complete state dict of a network on the CPU of the main rank, empty elsewhere; a collective call."""
    state = {}
    for name, tensor in network.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # one at a time, so that memory suffices
        if main:
            state[name] = full.detach().cpu()
    return state


def free_gathered(network: nn.Module) -> None:
    """Let go of gathered weights: ``parameters()`` gives the sharded ones, and the next pass sees changes of them."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def together(network: nn.Module) -> bool:
    """True if all ranks must run this network equally often, since every pass of it is a collective call."""
    return isinstance(network, FSDPModule) or getattr(network, "_parallel_config", None) is not None


def plain_class(network: nn.Module) -> type[Any]:
    """The network's class before FSDP put its own in front."""
    cls = type(network)
    return cls.__bases__[1] if isinstance(network, FSDPModule) else cls


def _pieces(network: nn.Module) -> list[nn.Module]:
    """Transformer blocks, or the heads of a discriminator."""
    names = set(getattr(network, "_repeated_blocks", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    return blocks or list(getattr(network, "heads", []))


def _broadcast(network: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], ranks: Ranks) -> None:
    """Give every rank its part of the main rank's weights, one tensor at a time."""
    persistent = network.state_dict()
    rest = {name: tensor for name, tensor in network.named_buffers() if name not in persistent}
    with torch.no_grad():
        for name, target in [*persistent.items(), *rest.items()]:
            source = weights[name] if name in weights else buffers[name]
            whole = source.to(ranks.device) if ranks.main else torch.empty_like(source, device=ranks.device)
            dist.broadcast(whole := whole.contiguous(), 0)
            put(target, whole)


def _square_sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    norms = torch._foreach_norm([t.float() for t in tensors]) if tensors else []
    return torch.stack([*norms, torch.zeros((), device=device)]).square().sum()
