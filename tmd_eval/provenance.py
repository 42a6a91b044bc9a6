"""Where a result comes from: command, code revision, device, package versions, UTC time."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from students.machine import cpu_name
from students.revision import code_revision
from tmd_eval import __version__

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "av")


def provenance(*, command: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """What every run and report records of its making.

    Args:
        command: the command line, by default this process's.
        device: "cpu", "cuda" or "cuda:N", whatever did the computing.

    Returns:
        command, code_revision, device (as a person would name it), packages (name to version), created (UTC, ISO 8601).
    """
    return {
        "command": command or command_line(),
        "code_revision": code_revision(),
        "device": device_name(device),
        "packages": package_versions(),
        "created": utc_now(),
    }


def command_line() -> str:
    """This process's command, to be pasted into a shell; passwords of databases are left out."""
    from leaderboard.errors import without_password

    return without_password(shlex.join(["tmd-eval", *sys.argv[1:]]))


def utc_now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    versions = {"python": platform.python_version(), "tmd-eval": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device: str) -> str:
    """The device as a person would name it, such as "Intel(R) Xeon(R) ... (cpu, 1 thread)"."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(torch.device(device))} ({device})"
    threads = torch.get_num_threads()
    return f"{cpu_name()} (cpu, {threads} thread{'s' * (threads > 1)})"
