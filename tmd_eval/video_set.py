"""A video set on disk: the units it consists of, its manifest, and what of it can be kept.

``RUN/videos/`` holds the videos, ``RUN/manifest.jsonl`` one row a finished video. A video is renamed into place
before its row is appended, so after a crash at any moment every row is true of a whole file; a half-written last row is
cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from students.errors import ConfigError
from tmd_eval.files import TEMPORARY, disk_full, is_disk_full, write_atomic

VIDEOS = "videos"
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One video to be made."""

    video: str
    """File name in ``videos/``."""
    prompt: str
    """The prompt."""
    text: str
    """The text fed to the model: the prompt, or an extended version of it."""
    line: int
    """Place of the prompt in its set, from 0."""
    index: int
    """Number of the sample of this prompt, from 0."""
    seed: int
    """Seed of its noise."""
    key: str
    """Hash of all that decides the pixels: model, prompt, seed, sampler, size."""


def unit_key(decisive: Mapping[str, Any], text: str, seed: int) -> str:
    """SHA-256 over all that decides a video's pixels.

    Args:
        decisive: what all videos of a run share: model hash, sampler settings, precision, size.
        text: fed to the model.
        seed: of its noise.
    """
    whole = json.dumps([dict(decisive), text, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(whole.encode()).hexdigest()


def read_manifest(run: Path) -> list[dict[str, Any]]:
    """The rows of a manifest; without one, none. A last line that a crash cut short is passed over.

    Raises:
        ConfigError: another line is broken; names it.
    """
    path = run / MANIFEST
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if Path(row["video"]).name != row["video"]:
                raise ValueError("the video lies elsewhere")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # not ended by a newline
                break
            raise ConfigError(f"Line {number} of {path} is broken ({error}); delete the line to go on.") from error
    return rows


def planned_videos(run: Path, prompts: Sequence[str] | None = None) -> list[str]:
    """Names of the videos that a run's ``config.yaml`` promises; none without that file.

    Args:
        run: the run folder.
        prompts: the whole prompt set, for sets whose videos are named after their prompts.

    Raises:
        ConfigError: the file does not say what the run is to hold.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return []
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
        lines, samples = config.get("lines"), int(config["samples_per_prompt"])
        lines = range(int(config["prompts"]["count"])) if lines is None else lines
        of_line = config.get("samples_of_line") or {}
        stems = [(f"{line:05d}" if prompts is None else prompts[line], of_line.get(line, samples)) for line in lines]
        return [f"{stem}-{index}.mp4" for stem, count in stems for index in range(count)][: config.get("limit")]
    except (yaml.YAMLError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not say which videos the run is to hold ({error!r}).") from error


def append_row(run: Path, row: Mapping[str, Any]) -> None:
    """Append a finished video to the manifest and sync it; on failure the manifest is as it was.

    The file is locked meanwhile, so that the ranks of a run may append to one manifest.

    Raises:
        TmdError: the disk is full.
    """
    path = run / MANIFEST
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.seek(0, os.SEEK_END)
        try:
            data = _lines([row])
            if file.write(data) != len(data):
                file.write(data[file.tell() - before :])
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), before)
            if is_disk_full(error):
                raise disk_full(path) from error
            raise


def write_manifest(run: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the manifest atomically."""
    write_atomic(run / MANIFEST, _lines(rows))


def is_whole(run: Path, row: Mapping[str, Any]) -> bool:
    """True when the row's video is there with the recorded bytes."""
    try:
        with (run / VIDEOS / row["video"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == row.get("sha256")
    except OSError:
        return False


def check_writable(run: Path, inside: Path | str = VIDEOS) -> None:
    """Make the run folder and one inside it, or fail before any work is done.

    Raises:
        ConfigError: it cannot be made or written to, or holds something else.
    """
    try:
        (run / inside).mkdir(parents=True, exist_ok=True)
        probe = run / inside / f"{TEMPORARY}probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # torchrun's ranks share it
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(run) from error
        raise ConfigError(f"Cannot write to {run} ({error.strerror}); choose another --out.") from error


def check_case(run: Path, names: Sequence[str]) -> None:
    """Refuse names that differ only in case on a disk that cannot tell them apart (VBench has two such prompts).

    Raises:
        ConfigError: the two would be one file.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            probe = run / VIDEOS / f"{TEMPORARY}Case"
            probe.touch()
            same = (run / VIDEOS / f"{TEMPORARY}case").exists()
            probe.unlink()
            if same:
                raise ConfigError(f"{other!r} and {name!r} would be one file on this disk; choose another --out.")
            return


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; the lock goes with the process, however that ends.

    Raises:
        ConfigError: another process is at work in it.
    """
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another tmd-eval is making videos in {run}; wait for it or choose another --out."
            ) from error
        yield


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
