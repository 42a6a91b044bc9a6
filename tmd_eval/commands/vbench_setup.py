"""``tmd-eval vbench setup`` and ``doctor``: the official VBench's environment and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def setup(
    detectron2: Annotated[
        Path | None, typer.Option(help="Checkout of detectron2, whose Python files the detector needs.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder with VBench's weights to copy.")] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download missing weights (about 7 GB) and detectron2; resumes.")
    ] = False,
    dimensions: Annotated[list[str] | None, typer.Option(help="Only these dimensions' weights.")] = None,
    unverified_weights: Annotated[
        bool, typer.Option("--unverified-weights", help="Take weights whose hash is not the published one.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="VBench-Long's own weights as well (DINOv2, DreamSim).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build the environment anew.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the environment; weights stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is missing and where from.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Build VBench's environment (about 40 s, 0.8 GB, needs the package index) and gather its weights.

    What is there stays; what could not be got is listed, and the exit code is then 4 if it was asked for.

    Example: tmd-eval vbench setup --detectron2 ~/detectron2 --weights /mnt/vbench
    """
    from students.errors import EnvironmentMissingError
    from tmd_eval.vbench import detectron, environment
    from tmd_eval.vbench import weights as files
    from tmd_eval.vbench.dimensions import DIMENSIONS, FIRST_FRAMES, check_dimension

    if remove:
        found, path = environment.remove(), str(environment.folder())
        text = f"{path} {'removed' if found else 'was not there'}"
        typer.echo(json.dumps({"path": path, "removed": found}) if json_ else text)
        return
    names = [check_dimension(d) for text in dimensions or [] for d in text.split(",") if d] or list(DIMENSIONS)
    names += FIRST_FRAMES.values() if long else []
    if dry_run:
        _show_plan(names, unverified_weights, force, json_)
        return
    result: dict[str, Any] = environment.setup(force=force, log=_say)
    failed: dict[str, str] = {}
    if detectron2 is not None:
        detectron.install(detectron2)
    elif fetch and not detectron.installed() and (reason := detectron.fetch()):
        failed["detectron2"] = reason
    if weights is not None:
        failed |= files.install(weights, names, unverified=unverified_weights)
    if fetch:
        failed |= files.fetch(names, unverified=unverified_weights, log=_say)
        failed = {k: v for k, v in failed.items() if k == "detectron2" or k in _problems(names, unverified_weights)}
    files.prepare()
    lacking = _problems(names, unverified_weights)
    result |= {"detectron2": detectron.installed(), "missing_weights": lacking, "failed": failed}
    state = "built" if result["built"] else "already there"
    lines = [f"{result['path']}: {state}, {result['megabytes']} MB, {result['seconds']} s"]
    lines += [f"could not get {name}: {reason}" for name, reason in failed.items()]
    if not detectron.installed():
        lines.append("no detectron2, which four dimensions need: --detectron2 CHECKOUT, or --fetch where online")
    if lacking:
        lines.append(f"{len(lacking)} weights files missing or wrong (tmd-eval vbench doctor lists them)")
    typer.echo(json.dumps(result) if json_ else "\n".join(lines))
    if failed:
        raise EnvironmentMissingError(f"Could not get {', '.join(failed)}; the reasons are above.")


def _show_plan(names: list[str], unverified: bool, force: bool, as_json: bool) -> None:
    """What a set-up would do, with the sources of the weights."""
    from tmd_eval.vbench import detectron, environment
    from tmd_eval.vbench.weights_manifest import BY_PATH

    reason = "--force" if force else environment.problem()
    lacking = {path: (text, BY_PATH[path]) for path, text in _problems(names, unverified).items()}
    if as_json:
        weights = {
            path: {"problem": text, "sources": list(file.urls), "bytes": file.size}
            for path, (text, file) in lacking.items()
        }
        plan = {"path": str(environment.folder()), "build": reason, "packages": environment.pins()}
        typer.echo(json.dumps({**plan, "detectron2": detectron.installed(), "weights": weights}))
        return
    what = f"{reason}: {len(environment.pins())} packages would be installed" if reason else "is ready"
    typer.echo(f"{environment.folder()} {what}")
    typer.echo(f"detectron2 {'is there' if detectron.installed() else 'is missing: ' + detectron.REPOSITORY}")
    for path, (text, file) in lacking.items():
        size = f", {file.size / 1e6:.0f} MB" if file.size else ""
        typer.echo(f"{path} {text}: {' or '.join(file.urls)}{size}")


def _problems(names: list[str], unverified: bool) -> dict[str, str]:
    from tmd_eval.vbench import weights

    return {path: reason for name in names for path, reason in weights.problems(name, unverified=unverified).items()}


def _say(text: str) -> None:
    typer.echo(text, err=True)


def doctor(json_: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """For each of the sixteen dimensions: importable, weights and their hash, device, and what to do.

    Example: tmd-eval vbench doctor
    """
    from tmd_eval.vbench import runner
    from tmd_eval.vbench.doctor import diagnose

    rows, extra = diagnose()
    if json_:
        typer.echo(json.dumps({"version": runner.official_version(), "dimensions": rows, "long": extra}))
        return
    typer.echo(f"{'dimension':24}{'import':8}{'device':8}weights")
    for row in rows:
        marks = [f"{Path(path).name} {digest[:8]}" for path, digest in row["weights"].items()]
        marks += [f"{Path(path).name} {reason}" for path, reason in row["weight_problems"].items()]
        typer.echo(
            f"{row['dimension']:24}{'ok' if row['importable'] else 'FAILS':8}{row['device']:8}"
            f"{', '.join(marks) or 'none needed'}"
        )
        if row["reason"]:
            typer.echo(f"{'':24}{row['reason']}")
    advice = {text: [r["dimension"] for r in rows if text in r["do"]] for row in rows for text in row["do"]}
    for text, names in advice.items():
        typer.echo(f"{len(names)} dimensions: {text}")
    typer.echo(f"{sum(row['ready'] for row in rows)} of {len(rows)} dimensions are ready")
    lacking = []
    for name, found in extra["problems"].items():
        words = [f"{Path(path).name} {text}" for path, text in found.items()]
        lacking.append(f"{name}: {runner.list_names(words, 3)}")
    typer.echo("VBench-Long lacks nothing more" if not lacking else "VBench-Long (--protocol long) lacks besides:")
    for line in lacking:
        typer.echo(f"  {line}")
    if lacking:
        typer.echo("  tmd-eval vbench setup --long --fetch, or --weights DIR")
    if extra["official_code"]:
        typer.echo(f"the wheel's own VBench-Long does not import ({extra['official_code']}); its steps are done here")
