"""Several ranks of a run as forked processes: cheaper than torchrun, which imports everything again in each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def in_ranks(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 900) -> list[Any]:
    """Run a function in ``world`` processes with torchrun's environment and give back what each returned.

    Raises:
        AssertionError: a rank failed; with its traceback.
        TimeoutError: ranks wait for each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]

    def rank(number: int) -> None:
        os.environ |= {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        faulthandler.dump_traceback_later(timeout - 5)  # where it waits
        try:
            outcome = (True, work(*arguments))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipes[number][1].send(outcome)
        os._exit(0)  # not the parent's pytest

    processes = [context.Process(target=rank, args=(number,)) for number in range(world)]
    for process in processes:
        process.start()
    try:
        outcomes = []
        for number, (receiver, _) in enumerate(pipes):
            if not receiver.poll(timeout):
                raise TimeoutError(f"rank {number} of {world} has not answered in {timeout} s")
            outcomes.append(receiver.recv())
    finally:
        for process in processes:
            process.join(1)
            process.kill()
            process.join()
    assert all(fine for fine, _ in outcomes), "\n".join(text for fine, text in outcomes if not fine)
    return [result for _, result in outcomes]
