"""Effective number of function evaluations: Eq. 16 of the paper."""

from __future__ import annotations

from students.errors import ConfigError


def effective_nfe(m: int, n: int | None, h: int | None, blocks: int | None) -> float:
    """Blocks run during generation over L, per guidance branch: M (1 + (N - 1) H / L), Eq. 16; M for plain students.

    Args:
        m: M, outer steps, at least 1.
        n: N, inner steps, at least 1; None without a flow head.
        h: H, blocks in the flow head, 1 to L - 1; None without one.
        blocks: L; needed with H.

    Raises:
        ConfigError: a number outside its range, N without H, or H without N or L.
    """
    if m < 1:
        raise ConfigError(f"M is {m}; there must be at least 1 outer step.")
    if h is None:
        if n not in (None, 1):
            raise ConfigError(f"N is {n} but H is not given; inner steps need a flow head (give H and L).")
        return float(m)
    if n is None or blocks is None:
        raise ConfigError(f"H is {h} but {'N' if n is None else 'L'} is not given; a flow head needs N, H and L.")
    if n < 1:
        raise ConfigError(f"N is {n}; there must be at least 1 inner step.")
    check_h(h, blocks)
    return m * (blocks + (n - 1) * h) / blocks


def check_h(h: int, blocks: int) -> None:
    """Refuse a head size outside 1 to L - 1.

    Raises:
        ConfigError: with H and L.
    """
    if blocks < 2:
        raise ConfigError(f"L is {blocks}; a transformer needs at least 2 blocks to be cut into backbone and head.")
    if not 1 <= h <= blocks - 1:
        raise ConfigError(f"H is {h}; the flow head needs 1 to {blocks - 1} of the {blocks} blocks.")


def branches(guidance: float) -> int:
    """Forward passes per evaluation: 2 with classifier-free guidance (scale above 1), else 1."""
    return 2 if guidance > 1 else 1
