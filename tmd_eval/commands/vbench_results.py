"""``tmd-eval vbench total``, ``compare`` and ``export``: what to do with scores that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def show(out: Path, record: dict[str, Any], names: list[str], recorded: int | None, as_json: bool) -> None:
    """Print the scores of a run."""
    scores = json.loads((out / "scores" / "summary.json").read_text("utf-8")) if record["dimensions"] else {}
    if as_json:
        wanted = {name: scores[name] for name in names if name in scores}
        totals = {key: 100 * total["value"] for key, total in (record["totals"] or {}).items()} or None
        typer.echo(
            json.dumps(
                {
                    "run": str(out), "recorded": recorded, "scores": wanted, "totals": totals,
                    "not_measured": record["not_measured"], "protocol": record["protocol"],
                }
            )
        )  # fmt: skip
        return
    for name in names:
        if name in record["not_measured"]:
            typer.echo(f"{name}: not measured ({record['not_measured'][name]})")
        if name not in scores:
            continue
        entry, of_all = scores[name], record["dimensions"][name]
        share = f", PARTIAL: {100 * entry['completeness']:.1f} % of the protocol's videos" if of_all["partial"] else ""
        unseen = f", {of_all['undetected']} more without a detection" if of_all["undetected"] else ""
        typer.echo(f"{name}: {_percent(entry)}, {entry['n']} videos{unseen}{share}")
    if record["totals"]:
        for key in ("quality", "semantic", "total"):
            typer.echo(f"{key}: {_percent(record['totals'][key])}")
    elif record["protocol"]["set"] == "standard":
        typer.echo(f"no total: {_why_no_total(record)}")


def _percent(entry: dict[str, Any]) -> str:
    between = "" if entry["low"] is None else f" ({100 * entry['low']:.2f} to {100 * entry['high']:.2f})"
    return f"{100 * entry['value']:.2f} %{between}"


def _why_no_total(record: dict[str, Any]) -> str:
    from tmd_eval.vbench.dimensions import DIMENSIONS

    missing = [name for name in DIMENSIONS if name not in record["dimensions"]]
    partial = [name for name, one in record["dimensions"].items() if one["partial"]]
    reasons = [f"not measured: {', '.join(missing)}"] if missing else []
    return "; ".join(reasons + ([f"partial: {', '.join(partial)}"] if partial else []))


def total(
    file: Annotated[Path, typer.Argument(help="JSON {dimension: percent} of all sixteen dimensions.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the totals as JSON, full precision.")] = False,
) -> None:
    """Quality, semantic and total score by the official constants, in percent.

    Example: tmd-eval vbench total scores.json
    """
    from tmd_eval.vbench.totals import totals_of_file

    result = totals_of_file(file)
    typer.echo(json.dumps(result) if json_ else "\n".join(f"{key}: {value:.2f}" for key, value in result.items()))


def compare(
    run_a: Annotated[Path, typer.Argument(help="Scored run folder.")],
    run_b: Annotated[Path, typer.Argument(help="Another, on the same prompts.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """B minus A on the prompts both have, with 95 % intervals and p-values corrected over the dimensions (Holm).

    Example: tmd-eval vbench compare runs/teacher runs/student
    """
    from tmd_eval.vbench.compare import compare_runs

    result = compare_runs(run_a, run_b)
    if json_:
        typer.echo(json.dumps(result))
        return
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{'B - A, points':24}{'difference':>12}{'95 % interval':>20}{'p':>9}{'p (Holm)':>10}{'prompts':>9}")
    for name, row in result["differences"].items():
        between = "-" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
        adjusted = "-" if row["p_holm"] is None else f"{row['p_holm']:.4f}"
        typer.echo(
            f"{name:24}{row['value']:>+12.2f}{between:>20}{row['p_value']:>9.4f}{adjusted:>10}{row['n_prompts']:>9}"
        )


def export(
    run: Annotated[Path, typer.Argument(help="Scored run folder.")],
    out: Annotated[Path | None, typer.Option(help="The zip file [default: RUN/vbench_submission.zip].")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Write the zip of results that VBench's submission script reads; only of a run with all sixteen dimensions.

    Example: tmd-eval vbench export runs/student
    """
    from tmd_eval.vbench.export import export_zip

    path = export_zip(run, out or run / "vbench_submission.zip")
    typer.echo(json.dumps({"zip": str(path)}) if json_ else str(path))


def diversity(
    folder: Annotated[Path, typer.Argument(help="Run folder, or a folder of mp4 files.")],
    out: Annotated[Path | None, typer.Option(help="Run folder for the scores [default: the folder, if a run].")] = None,
    features: Annotated[str, typer.Option(help="dino or clip.")] = "dino",
    prompt_file: Annotated[Path | None, typer.Option(help="JSON {file name: prompt} of other videos.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes [default: one a GPU, or one].")] = None,
    unverified_weights: Annotated[
        bool, typer.Option("--unverified-weights", help="Take weights whose hash is not the published one.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the entry as JSON.")] = False,
) -> None:
    """Mean feature distance between the samples of a prompt: shows the mode collapse that VBench cannot see.

    Example: tmd-eval vbench diversity runs/student
    """
    import torch

    from students.errors import ConfigError
    from tmd_eval.vbench import diversity as metric
    from tmd_eval.vbench import plan, runner
    from tmd_eval.vbench.score import Options

    run, _ = plan.locate(folder)
    target = out or run
    if target is None:
        raise ConfigError("Give --out RUN, the folder for the scores.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(prompts=read_captions(prompt_file), unverified=unverified_weights)
    processes = runner.devices(device, workers)
    entry = metric.score_diversity(folder, target, features, workers=processes, options=options)
    name = f"diversity_{features}"
    between = "" if entry["low"] is None else f" ({entry['low']:.4f} to {entry['high']:.4f})"
    typer.echo(json.dumps({name: entry}) if json_ else f"{name}: {entry['value']:.4f}{between}, {entry['n']} videos")


def read_captions(path: Path | None) -> dict[str, str] | None:
    """The prompt of each file from a JSON file; None without one."""
    from students.errors import ConfigError

    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path} as JSON ({error}); write {{file name: prompt}}.") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) and value.strip() for value in found.values()):
        raise ConfigError(f"{path} must map each file name to its prompt.")
    return dict(found)
