"""States of sharded runs: torch's distributed checkpoints, written in the background, read on any number of ranks.

``state/<iteration>/`` holds what every rank wrote of its own parts, and ``run.json``, which comes last, with the plain
values. A folder under a temporary name is unfinished.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from students.distributed import Ranks
from students.errors import ConfigError
from students.parallel import put
from students.trainer_state import STATES, prune

RECORD = "run.json"
Tree = dict[str, Any]
"""Nested dictionaries of tensors: what a distributed checkpoint holds."""


def optimiser_tree(optimiser: torch.optim.Optimizer, network: nn.Module) -> Tree:
    """The optimiser's state by name of the parameter and of the figure; empty before its first step."""
    state = optimiser.state
    return {name: dict(state[p]) for name, p in network.named_parameters() if state.get(p)}


def empty_optimiser_tree(network: nn.Module) -> Tree:
    """AdamW's state for every parameter that moves, to be read into."""
    return {
        name: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def set_optimiser(optimiser: torch.optim.Optimizer, network: nn.Module, tree: Tree) -> None:
    """Give an optimiser the state of :func:`optimiser_tree`."""
    for name, parameter in network.named_parameters():
        if name in tree:
            optimiser.state[parameter] = dict(tree[name])


def set_whole_optimiser(optimiser: torch.optim.Optimizer, network: nn.Module, state: Mapping[str, Any]) -> None:
    """Give an optimiser the ``state_dict()`` that an unsharded one saved.

    Args:
        optimiser: of the same network, on whole or sharded parameters.
        network: whose parameters it moves.
        state: whole tensors, by number in the order of the unsharded optimiser's groups.
    """
    gate = getattr(network, "gate_parameter", None)
    order = [p for p in network.parameters() if p is not gate] + ([] if gate is None else [gate])
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, order, strict=True):
        if number in state["state"]:
            mine = {}
            for key, value in state["state"][number].items():
                mine[key] = torch.zeros_like(value if key == "step" else parameter)
                put(mine[key], value)
            optimiser.state[parameter] = mine


class ShardedStates:
    """Writes the states of a sharded run; every method is called by all ranks together."""

    def __init__(self, out: Path, ranks: Ranks, *, keep: int, keep_every: int | None):
        """Open a process group of its own, for the messages of the background thread.

        Args:
            out: the run's folder.
            ranks: the processes.
            keep: latest states to keep.
            keep_every: states at multiples of this many iterations are kept, too.
        """
        self.out, self.ranks, self.keep, self.keep_every = out, ranks, keep, keep_every
        self._group: Any = dist.new_group(backend="gloo")
        self._running: tuple[int, Future[Any]] | None = None
        if ranks.main:
            for folder in (out / STATES).glob(".*.partial"):  # of a run that was killed
                shutil.rmtree(folder)
        ranks.barrier()

    def save(self, iteration: int, tensors: Tree, record: Mapping[str, Any], *, wait: bool) -> None:
        """Copy the tensors, and write them in the background.

        Args:
            iteration: names the state.
            tensors: this rank's parts.
            record: plain values.
            wait: return only when the state is complete.

        Raises:
            OSError: this or the state before could not be written; earlier ones are untouched.
        """
        self.finish()
        partial = self._partial(iteration)
        if self.ranks.main:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / RECORD).write_text(json.dumps(dict(record)))
        self.ranks.barrier()
        response = dcp.async_save(
            tensors,
            storage_writer=dcp.FileSystemWriter(partial),
            process_group=self._group,
            async_stager=BlockingAsyncStager(type_check=False),
        )
        future = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        self._running = (iteration, future)
        if wait:
            self.finish()

    def poll(self) -> None:
        """Put the state in its place if it is complete by now; costs nothing otherwise."""
        if self._running is not None and self._running[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the state that is being written, if any.

        Raises:
            OSError: it could not be written.
        """
        if self._running is None:
            return
        (iteration, future), self._running = self._running, None
        partial = self._partial(iteration)
        try:
            future.result()
        except CheckpointException as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(partial)
            for failure, _ in error.failures.values():
                raise failure from error
            raise
        if self.ranks.main:
            final = self.out / STATES / f"{iteration:08d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            prune(self.out, self.keep, self.keep_every)

    def _partial(self, iteration: int) -> Path:
        return self.out / STATES / f".{iteration:08d}.partial"


def read_record(folder: Path) -> dict[str, Any]:
    """The plain values of a sharded state.

    Raises:
        ConfigError: the folder is damaged.
    """
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None


def has(folder: Path, prefix: str) -> bool:
    """True if a sharded state has any tensor whose name starts so."""
    try:
        return any(name.startswith(prefix) for name in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    except Exception as error:  # it is unpickled: a damaged file may raise anything
        raise _damaged(folder, error) from None


def read_tensors(folder: Path, tensors: Tree) -> None:
    """Fill tensors, whole or cut up in any way, from a sharded state.

    Args:
        folder: the state.
        tensors: what to fill, in place.

    Raises:
        ConfigError: the folder is damaged, or its tensors do not fit.
    """
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant so
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise _damaged(folder, failure) from error
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: BaseException) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(f"training state {folder} is damaged ({reason}); delete it to go on from an earlier one.")
