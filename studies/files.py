"""Files of this room: written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path
from typing import Any

from studies.errors import StudyError


class DiskFullError(StudyError):
    """No space left; what was finished is kept."""

    exit_code = 1


def write_atomic(path: Path, data: bytes | str, *, private: bool = False) -> None:
    """Write a file under a temporary name beside it, sync it and rename it into place.

    Args:
        path: final path; its folder must exist.
        data: content; text is written as UTF-8.
        private: readable by the owner only.

    Raises:
        DiskFullError: there is no space; the old file, if any, is untouched.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600 if private else 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"The disk is full: could not write {path}; free some space and run the same command again to go on."
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write strict JSON, indented; see :func:`write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", private=private)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of a study.

    Raises:
        StudyError: it is missing or no JSON; ``what`` says what it should have been.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f"No {what} at {path}; give the folder that `tmd-eval study create` wrote.") from error
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is not the {what} it should be ({error}); restore it from a copy.") from error
