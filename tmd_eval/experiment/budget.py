"""How many iterations a budget allows: by updates of the student, or by total training compute."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from students.errors import ConfigError

if TYPE_CHECKING:
    from students.config import TrainConfig
    from students.method import Method

LONGEST = 10_000_000


def iterations_with_updates(config: TrainConfig, updates: int) -> int:
    """The fewest iterations in which the student moves so many times.

    Args:
        config: a training.
        updates: of the student, at least 1.

    Raises:
        ConfigError: the method never moves its student so often.
    """
    method = _method(config)
    seen = 0
    for iteration in range(1, LONGEST):
        seen += "student" in method.turn(iteration)
        if seen == updates:
            return iteration
    raise ConfigError(f"{config.method_name} does not move its student {updates} times.")


def student_updates(config: TrainConfig) -> int:
    """How often a training moves its student."""
    method = _method(config)
    return sum("student" in method.turn(iteration) for iteration in range(1, config.iterations + 1))


def iterations_within(config: TrainConfig, compute: float, blocks: int) -> int:
    """The most iterations whose compute, with all that is prepared for them, stays within a budget.

    Args:
        config: a training; its own iterations do not count.
        compute: block forwards plus twice the backwards, over all pairs.
        blocks: L of the base model.

    Raises:
        ConfigError: not even one student update fits.
    """
    kind, shape = config.kind, config.shape(blocks)
    left = compute - (kind.setup_cost(config.method, shape).total if kind.setup_cost else 0.0)
    iteration = 0
    while iteration < LONGEST:
        left -= config.batch * kind.cost(config.method, iteration + 1, shape).total
        if left < -1e-6 * max(compute, 1.0):
            break
        iteration += 1
    if iteration < iterations_with_updates(config, 1):
        raise ConfigError(
            f"the budget of equal compute leaves {config.method_name} no update of its student: the stages before "
            "take it up; give the budget a dearer reference."
        )
    return iteration


def _method(config: TrainConfig) -> Method:
    """The method without weights: on the meta device, of the smallest shape, for ``turn`` depends on settings alone."""
    import torch

    from students.build import new_student

    key = json.dumps([config.method_name, str(config.method), config.kind.flow_head])
    if key not in _METHODS:
        teacher = _teacher(max(config.student.h + 1, 4))
        with torch.device("meta"):
            negative = torch.empty(1, 1, 8)
            _METHODS[key] = config.kind.build(new_student(config, teacher), teacher, negative, config.method)
    return _METHODS[key]


_METHODS: dict[str, Method] = {}


@cache
def _teacher(blocks: int) -> Any:
    """A frozen teacher without weights, which methods share."""
    import torch
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(
            num_layers=blocks, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
            freq_dim=8, ffn_dim=8,
        ).requires_grad_(False)  # fmt: skip
