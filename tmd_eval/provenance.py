"""Where a result comes from: command, code revision, device, package versions, UTC time."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """This process's command, to be pasted into a shell."""
    return shlex.join(["tmd-eval", *sys.argv[1:]])


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


def code_revision() -> str:
    """The commit of the checkout this code runs from, with "+changes" if files differ; outside one, the version."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent), "--no-optional-locks"]
    try:
        # the package may be installed inside an unrelated repository, as in its .venv
        _run([*git, "ls-files", "--error-unmatch", here.name])
        commit = _run([*git, "rev-parse", "HEAD"]).strip()
        changed = _run([*git, "status", "--porcelain", "--untracked-files=no"]).strip()
    except (OSError, subprocess.SubprocessError):
        return f"tmd-eval {__version__}"
    return commit + ("+changes" if changed else "")


def device_name(device: str) -> str:
    """The device as a person would name it, such as "Intel(R) Xeon(R) ... (cpu, 1 thread)"."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(torch.device(device))} ({device})"
    threads = torch.get_num_threads()
    return f"{_cpu()} (cpu, {threads} thread{'s' * (threads > 1)})"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
