"""``tmd-eval doctor``: what this machine has and what is missing, with the command that mends it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated

import typer


def _rows() -> list[dict[str, str]]:
    from importlib import metadata

    import torch

    from students.base import micro_folder
    from students.machine import home
    from tmd_eval.vbench.environment import problem

    rows = [
        {"what": "python", "state": platform.python_version(), "do": ""},
        {"what": "cores", "state": str(os.cpu_count()), "do": ""},
    ]
    for package in ("torch", "diffusers", "transformers", "av", "sqlalchemy"):
        rows.append({"what": package, "state": metadata.version(package), "do": ""})
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
        rows.append({"what": "gpu", "state": f"{torch.cuda.device_count()} x {name}, {memory:.0f} GiB", "do": ""})
    else:
        rows.append({"what": "gpu", "state": "none", "do": "not needed for the micro world; Wan2.1 needs one"})
    weights = micro_folder()
    present = (weights / "model_index.json").is_file()
    rows.append(
        {
            "what": "micro teacher",
            "state": "shipped" if present else "missing",
            "do": "" if present else "install tmd-eval again; the weights are part of the package",
        }
    )
    reason = problem()
    rows.append(
        {
            "what": "vbench environment",
            "state": reason or "built",
            "do": "tmd-eval vbench setup" if reason else "tmd-eval vbench doctor",
        }
    )
    free = shutil.disk_usage(home() if home().exists() else Path.home()).free / 2**30
    rows.append({"what": "free disk", "state": f"{free:.0f} GiB", "do": "" if free > 5 else "free some space"})
    return rows


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Show what this machine has and what is missing.

    Example: tmd-eval doctor
    """
    rows = _rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['what']:<20} {row['state']:<36} {row['do']}".rstrip())
