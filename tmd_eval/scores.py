"""Scores of a run on disk: ``scores/{dimension}.jsonl``, one row a video, and ``scores/summary.json``."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from students.errors import ConfigError
from tmd_eval.files import write_atomic, write_json


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's scores for this process while it reads, changes and writes them."""
    (out / "scores").mkdir(parents=True, exist_ok=True)
    with (out / "scores" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_rows(run: Path, dimension: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one dimension's rows, each ``{"video", "value", "extra"}``."""
    (run / "scores").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomic(run / "scores" / f"{dimension}.jsonl", text)


def merge_summary(run: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put dimensions into ``summary.json``; those of other metrics stay. Returns the whole summary.

    Raises:
        ConfigError: the file that is there is not a summary.
    """
    path = run / "scores" / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        summary = {**summary, **entries}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a summary of scores ({error}); delete it and score again.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, summary)
    return summary
