"""The processes of one training run: alone, or started by torchrun (gloo on CPU, nccl on CUDA)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from students.errors import ConfigError, EnvironmentMissingError, TmdError

T = TypeVar("T")
_RUNS = count()
PATIENCE = timedelta(hours=2)
"""How long ranks wait for one that encodes data or writes a checkpoint; torchrun sees a dead one at once."""


class Ranks:
    """This process among those of the run; as a context it opens and closes the process group.

    By default every rank holds all weights (data parallelism) and the gradients are averaged by hand after the last
    backward pass, so that losses may call any part of a network: DistributedDataParallel wants everything to go through
    one ``forward``. :mod:`students.parallel` cuts weights up instead, where asked for.

    Attributes:
        rank, world: this process's number and how many there are.
        data_rank, data_world: the same counting once the ranks that share one sample's tokens.
    """

    def __init__(self, device: str = "auto", *, context: int = 1):
        """Read torchrun's environment.

        Args:
            device: "auto" (CUDA where there is one), "cpu" or "cuda".
            context: neighbouring ranks that share each sample's tokens.

        Raises:
            EnvironmentMissingError: "cuda" without a usable GPU.
            ConfigError: the ranks do not divide by ``context``.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentMissingError(
                "device is cuda but torch finds no GPU; set device to cpu or mend the driver."
            )
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world % context:
            raise ConfigError(f"parallel.context is {context}, which does not divide the {self.world} ranks.")
        self.data_rank, self.data_world = self.rank // context, self.world // context
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self._opened = False

    def __enter__(self) -> Ranks:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=_fresh_store(), rank=self.rank, world_size=self.world, timeout=PATIENCE
            )
            self._opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """True on the one rank that writes and speaks."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The device as provenance records it."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return name if self.world == 1 else f"{self.world} x {name}"

    def first(self, make: Callable[[], T]) -> T:
        """Run ``make`` on the main rank, then on the others, which find its files there.

        Raises:
            TmdError: it failed on the main rank, whose message tells why.
        """
        result = self.agree(lambda: make() if self.main else None)
        return make() if result is None else result

    def agree(self, make: Callable[[], T]) -> T:
        """Run ``make`` on every rank; where it fails on one, all ranks stop instead of waiting for it.

        Raises:
            TmdError: it failed on another rank, whose message tells why.
        """
        error: Exception | None = None
        try:
            result = make()
        except Exception as caught:
            error = caught
        if self.largest([float(error is not None)])[0]:
            raise error or TmdError("stopped, as another rank could not start; see its message.")
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def largest(self, values: list[float]) -> list[float]:
        """Element by element, the largest value over ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, in one message per call."""
        chosen = list(tensors)
        if self.world == 1 or not chosen:
            return
        flat = torch.cat([t.reshape(-1) for t in chosen])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _fresh_store() -> dist.Store | None:
    """torchrun's store with names of this attempt's and this run's own; None lets torch make one without torchrun.

    torch 2.14 hands the same store to every attempt, and counts process groups from 0 again once they are destroyed, so
    that a restarted rank, or a second run in one process, may find the addresses of dead ones.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}-run-{next(_RUNS)}", store)
