"""Saving and restoring a training run: one file for whole networks, one folder for networks cut up over ranks.

Either can be read by a run of the other kind and of any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from students import parallel_state
from students.distributed import Ranks
from students.parallel import Layout, free_gathered, put
from students.trainer_state import Average, load_state, save_state


class States:
    """The states of one run; every method is called by all ranks together."""

    def __init__(
        self,
        out: Path,
        ranks: Ranks,
        layout: Layout,
        *,
        networks: dict[str, nn.Module],
        optimisers: dict[str, torch.optim.AdamW],
        average: Average | None,
        averaged: nn.Module,
        keep: int,
        keep_every: int | None,
    ):
        """Take hold of what is saved and restored.

        Args:
            out: the run's folder.
            ranks: its processes.
            layout: how the networks lie over them.
            networks: by name.
            optimisers: by the network's name.
            average: moving average, if the run keeps one.
            averaged: the network it follows.
            keep: latest states to keep.
            keep_every: states at multiples of this many iterations are kept, too.
        """
        self.out, self.ranks, self.keep, self.keep_every = out, ranks, keep, keep_every
        self.networks, self.optimisers, self.average, self.averaged = networks, optimisers, average, averaged
        self.sharded = (
            parallel_state.ShardedStates(out, ranks, keep=keep, keep_every=keep_every) if layout.sharded else None
        )

    def save(self, iteration: int, record: dict[str, Any], *, wait: bool) -> None:
        """Save all that resuming needs.

        Args:
            iteration: names the state.
            record: plain values beside the tensors.
            wait: do not go on writing in the background.

        Raises:
            OSError: it could not be written; earlier states are untouched.
        """
        if self.sharded is not None:
            for network in self.networks.values():
                free_gathered(network)
            updates = self.average.updates if self.average else 0
            self.sharded.save(iteration, self._tensors(), {**record, "updates": updates}, wait=wait)
        elif self.ranks.main:
            state = {
                **record,
                "networks": {name: net.state_dict() for name, net in self.networks.items()},
                "optimisers": {name: opt.state_dict() for name, opt in self.optimisers.items()},
                "average": self.average.state_dict() if self.average else None,
            }
            save_state(self.out, iteration, state, self.keep, self.keep_every)

    def poll(self) -> None:
        """Finish a state that was written in the background, if it is complete by now."""
        if self.sharded is not None:
            self.sharded.poll()

    def load(self, path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Restore a state.

        Args:
            path: of the state.
            check: refuses a record that does not belong to this run, before anything changes.

        Returns:
            The record.

        Raises:
            ConfigError: the state is damaged, or refused.
        """
        if path.is_dir():
            record = parallel_state.read_record(path)
            check(record)
            self._load_folder(path, record)
            return record
        state = load_state(path)
        check(state)
        for name, network in self.networks.items():
            if self.sharded is None:
                network.load_state_dict(state["networks"][name])
                self.optimisers[name].load_state_dict(state["optimisers"][name])
                continue
            with torch.no_grad():
                for key, target in network.state_dict().items():
                    put(target, state["networks"][name][key])
            parallel_state.set_whole_optimiser(self.optimisers[name], network, state["optimisers"][name])
        if self.average:
            self.average.load_state_dict(state["average"])
        return state

    def _load_folder(self, path: Path, record: dict[str, Any]) -> None:
        tensors = self._tensors()
        for name, network in self.networks.items():
            moved = parallel_state.has(path, f"optimisers.{name}.")
            tensors["optimisers"][name] = parallel_state.empty_optimiser_tree(network) if moved else {}
        parallel_state.read_tensors(path, tensors)  # networks and average are filled in place
        for name, network in self.networks.items():
            parallel_state.set_optimiser(self.optimisers[name], network, tensors["optimisers"][name])
        if self.average:
            self.average.updates = record["updates"]

    def _tensors(self) -> parallel_state.Tree:
        names = [name for name, _ in self.averaged.named_parameters()]
        return {
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "optimisers": {
                name: parallel_state.optimiser_tree(self.optimisers[name], net) for name, net in self.networks.items()
            },
            "average": dict(zip(names, self.average.weights, strict=True)) if self.average else {},
        }
