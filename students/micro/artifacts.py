"""What both training scripts write: states, and the record of how the shipped weights were made."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch


def save_atomically(state: object, path: Path) -> None:
    """Save with torch under a temporary name, then rename."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def cpu_name() -> str:
    """Name and thread count of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} thread(s)"


def write_provenance(part: str, out: Path, seconds: float, figures: dict[str, float]) -> None:
    """Record beside the weights how a part of them was made.

    Args:
        part: "vae" or "teacher".
        out: the pipeline folder.
        seconds: time of training, over all resumed runs.
        figures: what it reached.
    """
    path = out / "provenance.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[part] = {
        "command": f"python -m students.micro.train_{part} {' '.join(sys.argv[1:])}".replace(str(Path.home()), "~"),
        "seconds": round(seconds),
        "device": cpu_name(),
        "torch": torch.__version__,
        **figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
