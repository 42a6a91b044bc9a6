"""Atomic writes: a file is there whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path
from typing import Any

from students.errors import TmdError

TEMPORARY = ".tmp-"
"""Prefix of files being written; whatever bears it when no process runs is debris of a killed one."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, sync it and rename it into place.

    Args:
        path: final path; its folder must exist.
        data: content; text is written as UTF-8.

    Raises:
        TmdError: the disk is full (exit code 1); the old file, if any, is untouched.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"  # short: the final name may already have 255 bytes
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(path) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), indented, atomically; see :func:`write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_disk_full(error: OSError) -> bool:
    """True when a write failed for want of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(path: Path) -> TmdError:
    """The error for a full disk: one sentence, exit code 1."""
    return TmdError(
        f"The disk is full: could not write {path}; all finished files are kept, free some space "
        "and run the same command again to go on."
    )


def remove_debris(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
