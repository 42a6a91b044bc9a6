"""The order in which training pairs are drawn: a pure function of the seed and the position."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream_seed(*key: int | str) -> int:
    """A seed in [0, 2**63) for the random stream of that name; different keys give unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


class Order:
    """Epochs without replacement, each in its own random order."""

    def __init__(self, count: int):
        """Number the items from 0 to ``count`` - 1."""
        self.count = count
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def at(self, seed: int, position: int) -> int:
        """The item at a position of the endless sequence that the seed stands for."""
        epoch, place = divmod(position, self.count)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(stream_seed(seed, "epoch", epoch))
            self._epoch = (seed, epoch), torch.randperm(self.count, generator=generator)
        return int(self._epoch[1][place])
