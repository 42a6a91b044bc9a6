"""The processes of one evaluation: those of torchrun, on hosts that share a file system, or just this one."""

from __future__ import annotations

import os
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: a rank's share of a whole set may take days on a CPU."""


class Ranks:
    """This process's place among those that torchrun started; gathers over gloo, never over the GPUs."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))

    def __enter__(self) -> Ranks:
        if self.world > 1:
            import torch.distributed as distributed

            distributed.init_process_group(
                "gloo", store=_own_store(), rank=self.rank, world_size=self.world, timeout=PATIENCE
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1 and kind is None:
            import torch.distributed as distributed

            distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of the ranks; also a barrier."""
        if self.world == 1:
            return [value]
        import torch.distributed as distributed

        values: list[T] = [value] * self.world
        distributed.all_gather_object(values, value)
        return values


def _own_store() -> Any:
    """torchrun's store under a prefix of its own: generation may have used it before; None lets torch make one."""
    import torch.distributed as distributed

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return distributed.PrefixStore(f"vbench-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
