"""This machine: where what can be made or fetched again is kept, and the name of its processor. Imports no torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def home() -> Path:
    """The folder of everything that can be made or fetched again: ``TMD_EVAL_HOME``, by default ~/.cache/tmd-eval."""
    return Path(os.environ.get("TMD_EVAL_HOME") or "~/.cache/tmd-eval").expanduser().absolute()


def cpu_name() -> str:
    """The processor as a person would name it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
