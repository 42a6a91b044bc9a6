"""Which code made a result."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path


def code_revision() -> str:
    """The commit of the checkout this code runs from, with "+changes" if files differ; outside one, the version."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), "--no-optional-locks", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        # the package may be installed inside an unrelated repository, as in its .venv
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return f"tmd-eval {importlib.metadata.version('tmd-eval')}"
    except importlib.metadata.PackageNotFoundError:  # files that were copied somewhere
        return "unknown"
