"""Run the command of a report or run again and say whether its figures agree with the new ones."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from students.errors import ConfigError, TmdError


def recorded_command(folder: Path) -> list[str]:
    """The arguments of the ``tmd-eval`` command that made a report folder or a run folder.

    Raises:
        ConfigError: the folder is neither, or its command is not one of tmd-eval's.
    """
    report, config = folder / "report.json", folder / "config.yaml"
    if report.is_file():
        command = json.loads(report.read_text(encoding="utf-8")).get("command", "")
    elif config.is_file():
        command = yaml.safe_load(config.read_text(encoding="utf-8")).get("command", "")
    else:
        raise ConfigError(f"{folder} is neither a report (report.json) nor a run (config.yaml).")
    words = shlex.split(command)
    if words[:1] != ["tmd-eval"] or "--out" not in words[:-1]:
        raise ConfigError(
            f"the command recorded in {folder} is {command!r}; only tmd-eval commands with --out can be rerun."
        )
    return words[1:]


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of each figure to its value, low and high; in a report "row / metric", the budget being part of the row."""
    report, summary = folder / "report.json", folder / "scores" / "summary.json"
    if report.is_file():
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        names = [f"{row['name']}, {row['budget']}" if row.get("budget") else row["name"] for row in rows]
        metrics = [row["metrics"] for row in rows]
        return {
            f"{name} / {key}": metric for name, own in zip(names, metrics, strict=True) for key, metric in own.items()
        }
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    raise ConfigError(f"{folder} has no figures: neither report.json nor scores/summary.json.")


def compare(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a figure: old, new, the half width allowed for their difference, and whether they agree.

    Two independent figures with intervals of half widths a and b agree where they differ by at most
    sqrt(a^2 + b^2), the half width of the interval of their difference. Figures without an interval must be the same.
    """
    for name in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            yield {"figure": name, "old": a and a["value"], "new": b and b["value"], "allowed": None, "agrees": False}
            continue
        bounded = [m for m in (a, b) if m["low"] is not None and m["high"] is not None]
        half = [max(m["high"] - m["value"], m["value"] - m["low"]) for m in bounded]
        allowed = math.hypot(*half)
        agrees = abs(a["value"] - b["value"]) <= allowed + 1e-12
        yield {"figure": name, "old": a["value"], "new": b["value"], "allowed": allowed, "agrees": agrees}


def rerun(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Run a folder's command again, into another folder, and compare.

    Args:
        folder: report or run.
        out: where the new one goes; must not hold anything.

    Returns:
        Rows of :func:`compare`.

    Raises:
        ConfigError: see :func:`recorded_command`; or ``out`` is not empty.
        TmdError: the command failed.
    """
    words = recorded_command(folder)
    figures(folder)  # before hours of work
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another --out for the new run.")
    words[words.index("--out") + 1] = str(out)
    code = subprocess.call([sys.executable, "-m", "tmd_eval.cli", *words], stdout=sys.stderr)
    if code:
        raise TmdError(f"the command ended with exit code {code}: tmd-eval {shlex.join(words)}")
    return against(folder, out)


def against(folder: Path, made: Path) -> list[dict[str, Any]]:
    """Compare a report or run with one that was made before.

    Args:
        folder: report or run.
        made: the other, or the folder of an experiment with its report.

    Returns:
        Rows of :func:`compare`.

    Raises:
        ConfigError: one of them has no figures.
    """
    other = next((place for place in (made / "report", made) if (place / "report.json").is_file()), made)
    return list(compare(figures(folder), figures(other)))
