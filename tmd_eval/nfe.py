"""Effective NFE measured from the blocks that a real sample runs, to hold against Eq. 16 (:mod:`students.nfe`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from students.nfe import branches, effective_nfe

if TYPE_CHECKING:
    from students.checkpoint import Checkpoint

__all__ = ["effective_nfe", "measure_effective_nfe"]


def measure_effective_nfe(
    checkpoint: Checkpoint, m: int | None = None, n: int | None = None, guidance: float | None = None
) -> float:
    """Generate one video and count executed transformer blocks, over L, per guidance branch.

    Args:
        checkpoint: a student or a teacher.
        m: M, by default the checkpoint's own.
        n: N, by default the checkpoint's own.
        guidance: guidance scale w, by default the checkpoint's own.

    Raises:
        ConfigError: M, N or the guidance does not suit the checkpoint.
    """
    from students.tmd import TMDStudent

    network = checkpoint.network
    parts = ("backbone_blocks", "head_blocks") if isinstance(network, TMDStudent) else ("blocks",)
    blocks = [block for part in parts for block in getattr(network, part)]
    executed = 0

    def count(module: object, arguments: object, output: object) -> None:
        nonlocal executed
        executed += 1

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        checkpoint.sample([""], [0], m=m, n=n, guidance=guidance)
    finally:
        for handle in handles:
            handle.remove()
    return executed / (len(blocks) * branches(checkpoint.settings(m, n, guidance)["guidance"]))
