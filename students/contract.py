"""What every method must keep to, checked on a real configuration: run it on a student of your own.

    python -m students.contract CONFIG.yaml [--set name=value ...]

The trainer resumes to the bit, shares batches among ranks, budgets compute and writes checkpoints on the strength of
these promises, so a method that breaks one breaks them silently.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.autograd import forward_ad

from students.build import Parts, build_parts, student_spec
from students.checkpoint import open_checkpoint, save_student
from students.config import TrainConfig, load_config, resolve
from students.distributed import Ranks
from students.errors import TmdError
from students.method import Batch, Cost
from students.settings import Layer, flatten

HORIZON = 20_000
"""Iterations whose turns are looked at."""
DRAWS = 8
"""Batches over which the cost of an iteration is averaged."""
TOLERANCE = 0.2
"""Largest relative difference between the blocks a method says it runs and those it runs."""


class ContractError(TmdError):
    """A method does not keep to what the trainer relies on; the message says which promise and how to mend it."""


def check_contract(config: TrainConfig) -> Iterator[str]:
    """Check a method, promise by promise.

    Args:
        config: A run with it, on a base model small enough for some dozen forward and backward passes.

    Yields:
        Each promise that is kept, as a sentence.

    Raises:
        ContractError: the first promise that is broken.
        ConfigError: the configuration does not fit its base model, parent or data.
    """
    yield _settings(config)
    with Ranks(config.device) as ranks:
        parts = build_parts(config, ranks, progress=False)
        yield _networks(config, parts)
        firsts = _turns(config, parts)
        yield f"turns follow from the iteration alone; the student moves; kinds of turn: {len(firsts)}"
        for iteration in firsts:
            _losses(config, parts, iteration)
        yield "losses are finite, repeat to the bit, and take every draw from the generator"
        for iteration in firsts:
            _gradients(config, parts, iteration)
        yield "gradients reach the networks whose turn it is, and no others"
        yield _costs(config, parts)
        yield _checkpoint(config, parts)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ContractError(message)


def _settings(config: TrainConfig) -> str:
    again = resolve([Layer("config.yaml", flatten(yaml.safe_load(config.yaml())))])
    _require(
        again.tree() == config.tree(), "settings change on their way through YAML; use plain values in the config."
    )
    return "settings survive YAML"


def _networks(config: TrainConfig, parts: Parts) -> str:
    networks = parts.method.networks
    _require(networks.get("student") is parts.student, 'networks["student"] must be the student that build was given.')
    frozen = {p.data_ptr() for p in parts.base.transformer.parameters()}
    for name, network in networks.items():
        trained = [p for p in network.parameters() if p.requires_grad]
        _require(bool(trained), f"network {name} has nothing to train; leave it out of networks.")
        shared = any(p.data_ptr() in frozen for p in trained)
        _require(not shared, f"network {name} trains weights of the teacher itself; copy them (copy.deepcopy).")
    _require(
        not any(p.requires_grad for p in parts.base.transformer.parameters()),
        "the teacher has trainable weights; leave it frozen.",
    )
    held = [name for name, value in vars(parts.method).items() if value is parts.base.transformer]
    _require(
        held in ([], ["teacher"]),
        f"the method keeps the teacher as {' and '.join(held)}; call it teacher, where the trainer looks for it.",
    )
    return f"networks: {', '.join(networks)}"


def _turns(config: TrainConfig, parts: Parts) -> list[int]:
    """The first iteration of every kind of turn and of terms."""
    method, found = parts.method, dict[object, int]()
    for iteration in range(1, min(config.iterations, HORIZON) + 1):
        turn = method.turn(iteration)
        _require(
            turn == method.turn(iteration), f"turn({iteration}) differs from call to call; use the iteration only."
        )
        _require(bool(turn), f"nothing moves at iteration {iteration}; name at least one network.")
        unknown = [name for name in turn if name not in method.networks]
        _require(not unknown, f"turn({iteration}) names {unknown}, which networks lacks.")
        found.setdefault((turn, _cost(config, parts, iteration)), iteration)
    moves = any("student" in method.turn(i) for i in range(1, config.iterations + 1))
    _require(moves, f"the student never moves in {config.iterations} iterations.")
    return list(found.values())


def _cost(config: TrainConfig, parts: Parts, iteration: int) -> Cost:
    return config.kind.cost(config.method, iteration, config.shape(parts.base.blocks))


def _batch(config: TrainConfig, parts: Parts, iteration: int) -> Batch:
    micro, _ = config.passes(1)
    batch = parts.data.draw(config.seed, iteration, config.batch, slice(0, micro))
    device = parts.base.device
    return replace(batch, latents=batch.latents.to(device), text=batch.text.to(device))


def _losses(config: TrainConfig, parts: Parts, iteration: int) -> None:
    batch, method = _batch(config, parts, iteration), parts.method

    def values(seed: int) -> dict[str, Tensor]:
        terms = method.losses(batch, iteration, torch.Generator().manual_seed(seed))
        _require(bool(terms), f"losses returns no term at iteration {iteration}.")
        for name, term in terms.items():
            fit = term.ndim == 0 and term.requires_grad and bool(torch.isfinite(term))
            _require(fit, f"loss term {name} at iteration {iteration} must be a finite scalar with a gradient.")
        return {name: term.detach().clone() for name, term in terms.items()}

    state = torch.get_rng_state()
    first = values(0)
    _require(
        torch.equal(state, torch.get_rng_state()),
        f"losses draws from torch's global random state at iteration {iteration}; use the generator it gets.",
    )
    metrics = method.metrics()
    plain = all(isinstance(name, str) and isinstance(value, float) for name, value in metrics.items())
    _require(plain, f"metrics must be names with floats, not {metrics!r}.")
    values(1)
    again = values(0)
    same = first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    _require(
        same,
        f"losses at iteration {iteration} differ for the same weights, batch and generator; keep nothing between calls "
        "that they depend on (a resumed run would not have it), but in networks.",
    )


def _gradients(config: TrainConfig, parts: Parts, iteration: int) -> None:
    method = parts.method
    everything = {**method.networks, "the teacher": parts.base.transformer}
    for network in everything.values():
        network.zero_grad(set_to_none=True)
    terms = method.losses(_batch(config, parts, iteration), iteration, torch.Generator().manual_seed(2))
    torch.stack([term.double() for term in terms.values()]).sum().backward()
    turn = method.turn(iteration)
    for name, network in everything.items():
        reached = any(p.grad is not None for p in network.parameters())
        if name not in turn:
            _require(not reached, f"the losses of iteration {iteration} reach {name}, whose turn it is not; detach.")
        else:
            _require(reached, f"the losses of iteration {iteration} do not reach {name}, whose turn it is.")
        network.zero_grad(set_to_none=True)


@contextmanager
def counted_blocks(networks: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Count the Wan blocks run while open, in samples: [forwards, backwards], as :class:`Cost` counts them.

    Args:
        networks: Where the blocks are; a network that lies in two of them is counted once.
    """
    seen = [0.0, 0.0]

    def note(block: nn.Module, arguments: Any, output: Tensor) -> None:
        rows = len(output)
        # Inside torch.func.jvp a block gets a value with a tangent, and does the work of two.
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(arguments[0]).tangent is not None
        seen[0] += 2 * rows if dual else rows
        if output.requires_grad:
            share = 1.0 if any(p.requires_grad for p in block.parameters()) else 0.5
            output.register_hook(lambda gradient: seen.__setitem__(1, seen[1] + share * rows))

    blocks = {m for network in networks for m in network.modules() if isinstance(m, WanTransformerBlock)}
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def measured_cost(config: TrainConfig, parts: Parts, iteration: int) -> Cost:
    """Blocks run by one iteration for one pair, counted over some batches.

    Args:
        config: The run.
        parts: Its networks and data.
        iteration: Which iteration, from 1.
    """
    total, pairs = Cost(), 0
    for draw in range(DRAWS):
        batch = _batch(config, parts, draw + 1)
        with counted_blocks([parts.base.transformer, *parts.method.networks.values()]) as seen:
            terms = parts.method.losses(batch, iteration, torch.Generator().manual_seed(draw))
            torch.stack([term.double() for term in terms.values()]).sum().backward()
        total, pairs = total.plus(Cost(*seen)), pairs + len(batch.latents)
    for network in parts.method.networks.values():
        network.zero_grad(set_to_none=True)
    return total.times(1 / pairs)


def _costs(config: TrainConfig, parts: Parts) -> str:
    lines = []
    kinds: dict[tuple[str, ...], int] = {}
    for iteration in range(1, min(config.iterations, HORIZON) + 1):
        kinds.setdefault(parts.method.turn(iteration), iteration)
    for turn, iteration in kinds.items():
        said, found = _cost(config, parts, iteration), measured_cost(config, parts, iteration)
        for name in ("forwards", "backwards"):
            a, b = getattr(said, name), getattr(found, name)
            _require(
                abs(a - b) <= TOLERANCE * max(b, 1),
                f"the cost of iteration {iteration} says {a:g} block {name} a pair, but {b:g} are run; mend cost.",
            )
        lines.append(f"{'+'.join(turn)} {found.forwards:g} forwards, {found.backwards:g} backwards")
    return "cost counts the blocks that are run: " + "; ".join(lines)


def _checkpoint(config: TrainConfig, parts: Parts) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        save_student(path, parts.student, student_spec(config, parts.base, {}))
        checkpoint = open_checkpoint(path)
        settings = checkpoint.settings()
        video = checkpoint.sample([""], [0])
        again = checkpoint.sample([""], [0])
    _require(torch.equal(video, again), "sampling the same seed twice gives two videos.")
    return f"the checkpoint opens and samples ({settings['method']}, effective NFE {settings['effective_nfe']:g})"


def main() -> None:
    """Entry point of ``python -m students.contract``."""
    parser = argparse.ArgumentParser(prog="python -m students.contract", description="Check a method.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    try:
        for promise in check_contract(load_config(arguments.config, arguments.set)):
            print("ok   " + promise, flush=True)
    except TmdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
