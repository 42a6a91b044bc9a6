"""Safetensors files on disk: checked before loading, hashed for provenance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from students.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); restore it or give another folder.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it or give another folder.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object of keys; restore it.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, all there and none cut short.

    Args:
        folder: for example ``PIPELINE/transformer``.

    Raises:
        ConfigError: no weights, only pickled ones, a missing shard, or a truncated file, with its name.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        if pickled:
            raise ConfigError(
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code when loaded; convert them to "
                "safetensors (save_pretrained of diffusers or transformers does)."
            )
        raise ConfigError(f"{folder} has no *.safetensors file; restore the weights or give another folder.")
    for index in folder.glob("*.safetensors.index.json"):
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise ConfigError(f"{folder / name} is missing, though {index.name} lists it; restore the file.")
    for path in files:
        check_safetensors(path)
    return files


def check_safetensors(path: Path) -> None:
    """Refuse a truncated or damaged file; reads its header only.

    Raises:
        ConfigError: with the file's name.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again."
        ) from error


def combined_hash(files: Iterable[Path]) -> str:
    """sha256 over the sorted sha256 of the files: the same weights give the same hash wherever they lie."""
    return hashlib.sha256("".join(sorted(map(file_hash, files))).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file, remembered for this process as long as its size and time stay."""
    resolved = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", resolved.name):  # Hugging Face's cache names large files by their sha256
        return resolved.name
    status = resolved.stat()
    return _file_hash(resolved, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
