"""``tmd-eval nfe``: effective NFE by Eq. 16, and measured from a real sample."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from students.errors import ConfigError
from students.nfe import branches, effective_nfe


def nfe(
    m: Annotated[int | None, typer.Option("--m", help="M, outer steps [default: the checkpoint's].")] = None,
    n: Annotated[int | None, typer.Option("--n", help="N, inner steps [default: the checkpoint's].")] = None,
    h: Annotated[int | None, typer.Option("--h", help="H, blocks in the flow head; none for plain students.")] = None,
    blocks: Annotated[int | None, typer.Option(help="L, blocks of the transformer (30 for 1.3B, 40 for 14B).")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale w; above 1 doubles forward passes [default: the checkpoint's, or 1]."),
    ] = None,
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint folder, micro, pipeline folder or hub id.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Generate one video and count the blocks run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Effective NFE: blocks run during generation over L, M (1 + (N - 1) H / L).

    Example: tmd-eval nfe --m 2 --n 2 --h 5 --blocks 30
    """
    result = _from_checkpoint(ckpt, m, n, h, blocks, guidance, measure) if ckpt else _formula(m, n, h, blocks, guidance)
    if measure and not ckpt:
        raise ConfigError("--measure runs a model; say which with --ckpt.")
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"effective NFE   {result['effective_nfe']:.4g}")
    if measure:
        typer.echo(f"measured        {result['measured_effective_nfe']:.4g}")
    typer.echo(f"forward passes  {result['forward_passes']:.4g}")


def _formula(m: int | None, n: int | None, h: int | None, blocks: int | None, guidance: float | None) -> dict[str, Any]:
    if m is None:
        raise ConfigError("Give --m (with --n, --h and --blocks for a TMD student), or --ckpt.")
    if blocks is not None and blocks < 1:
        raise ConfigError(f"L is {blocks}; a transformer has at least 1 block.")
    value = effective_nfe(m, n, h, blocks)
    passes = value * branches(1.0 if guidance is None else guidance)
    return {"effective_nfe": value, "forward_passes": passes, "m": m, "n": n, "h": h, "blocks": blocks}


def _from_checkpoint(
    ckpt: str, m: int | None, n: int | None, h: int | None, blocks: int | None, guidance: float | None, measure: bool
) -> dict[str, Any]:
    if h is not None or blocks is not None:
        raise ConfigError("H and L are fixed by the checkpoint; give --ckpt without --h and --blocks.")
    from students.checkpoint import open_checkpoint
    from tmd_eval.nfe import measure_effective_nfe

    checkpoint = open_checkpoint(ckpt)
    settings = checkpoint.settings(m, n, guidance)
    result = {key: settings[key] for key in ("effective_nfe", "forward_passes", "m", "n", "h", "blocks")}
    if measure:
        result["measured_effective_nfe"] = measure_effective_nfe(checkpoint, m, n, guidance)
    return result
