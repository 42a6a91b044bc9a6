"""What both training scripts write: states, and the record of how the shipped weights were made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from students.machine import cpu_name


def save_atomically(state: object, path: Path) -> None:
    """Save with torch under a temporary name, then rename."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


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
        "device": f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        **figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
