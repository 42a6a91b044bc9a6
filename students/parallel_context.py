"""Context parallelism: several ranks share the tokens of one sample, by diffusers' own hooks and attention.

Every rank holds the whole latents and computes on its share of the tokens. diffusers splits tokens going in and
gathers them coming out; going back, a rank's gradient of a whole latent knows only the tokens of that rank. Where
gradients flow on into the latents' past, :func:`join` adds the ranks' shares up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

STUDENT_PLAN: dict[str, Any] = {
    "rope": {index: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True) for index in (0, 1)},
    "backbone_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
    "fuse": {"y_tokens": ContextParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
"""Where a TMD student's tokens are split and gathered: Wan's own plan, with the tokens of y_s as a second way in."""


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def join(network: nn.Module, x: Tensor) -> Tensor:
    """The same latents; going back, the sum of the gradients of all ranks that share the sample.

    Args:
        network: that takes the latents; without context parallelism nothing happens.
        x: on its way into the network, equal on these ranks.
    """
    group = _group(network)
    return x if group is None or not x.requires_grad else _Join.apply(x, group)


def gather_tokens(network: nn.Module, tokens: Tensor) -> Tensor:
    """All tokens (B, S, D) of a block's output, of which this rank may hold a share."""
    if _group(network) is None:
        return tokens
    from diffusers.hooks.context_parallel import EquipartitionSharder

    parallel: Any = network._parallel_config
    return EquipartitionSharder.unshard(tokens, 1, parallel.context_parallel_config._flattened_mesh)


def _group(network: nn.Module) -> dist.ProcessGroup | None:
    parallel = getattr(network, "_parallel_config", None)
    return None if parallel is None else parallel.context_parallel_config._flattened_mesh.get_group()
