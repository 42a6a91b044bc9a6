"""What a run folder says: settings, provenance, scores and each video's score, as generation and scoring left it."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from leaderboard.checks import check_metric, finite, without_lone_totals
from leaderboard.display import default_name
from leaderboard.errors import LeaderboardError
from leaderboard.models import ROLES

IDENTITY = (
    *("role", "method", "m", "n", "h", "guidance", "sampler", "base", "checkpoint", "checkpoint_hash"),
    *("prompts_name", "prompts_sha256", "samples_per_prompt", "seeds", "height", "width", "frames", "fps"),
    *("dtype", "device", "code_revision", "created"),
)
"""What tells two measurements apart. Scores and the manifest do not belong to it, so a run that is recorded before it
is finished, and again after, fills in its own row; a run made anew has its own ``created`` and so its own row."""

T = TypeVar("T", int, float, str)


def read_manifest(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's manifest.jsonl, in the order of the file; a last line that a crash cut short is passed over.

    Raises:
        LeaderboardError: the file is missing or a line is no JSON object with a ``video``.
    """
    path = run / "manifest.jsonl"
    rows = []
    lines = _read(path).split("\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # empty, or not ended by a newline
            break
        try:
            row = json.loads(line)
            row["video"]
        except (ValueError, KeyError, TypeError) as error:
            raise LeaderboardError(f"Line {number} of {path} does not describe a video; make the run again.") from error
        rows.append(row)
    return rows


def read_run(run: Path, *, name: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The columns of the result and of its metrics, as a run folder states them; see :func:`record_run`."""
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise LeaderboardError(f"{path} is not YAML; make the run again.") from error
    if not isinstance(config, dict):
        raise LeaderboardError(f"{path} is not a mapping; make the run again.")
    checkpoint, prompts = _section(config, "checkpoint", path), _section(config, "prompts", path)
    manifest = read_manifest(run)
    role = _need(checkpoint, "role", str, path)
    if role not in ROLES:
        raise LeaderboardError(f"{path} gives the role {role!r}; it must be one of {', '.join(ROLES)}.")
    height, width = _size(config.get("size"), path)
    seed = config.get("seed")
    seeds = seed if isinstance(seed, list) else [seed] if seed is not None else []
    seconds = [_maybe(row, "seconds", float, run / "manifest.jsonl") for row in manifest]
    timed = [value for value in seconds if value is not None]
    packages = config.get("packages") or {}
    if not isinstance(packages, dict):
        raise LeaderboardError(f"{path} gives {packages!r} as 'packages', which must be a mapping.")
    columns: dict[str, Any] = {
        "source": "measured",
        "role": role,
        "method": _need(checkpoint, "method", str, path),
        **{key: _maybe(checkpoint, key, int, path) for key in ("m", "n", "h", "blocks")},
        **{key: _maybe(checkpoint, key, float, path) for key in ("effective_nfe", "forward_passes", "guidance")},
        "sampler": _text(checkpoint.get("sampler")),
        "base": _base(checkpoint.get("base")),
        "checkpoint": _text(checkpoint.get("ref")),
        "checkpoint_hash": _text(checkpoint.get("hash")),
        "prompts_name": _need(prompts, "name", str, path) + _texts(config.get("texts")),
        "prompts_sha256": _need(prompts, "sha256", str, path),
        "prompts_count": _need(prompts, "count", int, path),
        "samples_per_prompt": _need(config, "samples_per_prompt", int, path),
        "seeds": [_need({"seed": one}, "seed", int, path) for one in seeds],
        "height": height,
        "width": width,
        "frames": _maybe(config, "frames", int, path),
        "fps": _maybe(config, "fps", float, path),
        "dtype": _text(config.get("dtype")),
        "videos": len({row["video"] for row in manifest}),
        "seconds_per_video": statistics.median(timed) if timed else None,
        "batch_size": _maybe(config, "batch_size", int, path),
        "device": _need(config, "device", str, path),
        "code_revision": _need(config, "code_revision", str, path),
        "packages": {str(key): str(value) for key, value in packages.items()},
        "command": _need(config, "command", str, path),
        "created": _time(config.get("created"), path),
        "manifest_sha256": hashlib.sha256((run / "manifest.jsonl").read_bytes()).hexdigest(),
        "run": str(run.resolve()),
    }
    base = checkpoint.get("base")
    columns["name"] = name or default_name(
        base=str(base["ref"] if isinstance(base, dict) else base or checkpoint.get("name")),
        **{key: columns[key] for key in ("role", "method", "m", "n", "h")},
    )
    identity = json.dumps([columns[key] for key in IDENTITY], default=str)
    columns["key"] = hashlib.sha256(identity.encode()).hexdigest()
    return columns, _metrics(run / "scores" / "summary.json")


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        metrics = [check_metric(str(name), entry) for name, entry in sorted(json.loads(_read(path)).items())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeaderboardError(
            f"{path} is not a summary of scores ({type(error).__name__}: {error}); score the run again."
        ) from error
    return without_lone_totals(metrics)


def prompt_id(prompt: str) -> int:
    """A number for a prompt's text: the first 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1


def video_scores(run: Path, metrics: Iterable[str]) -> list[dict[str, Any]]:
    """The score of each video in each metric that has a file of them, as columns of ``models.VideoScore``.

    Videos without a value (nothing to judge in them) and files of other metrics are passed over.

    Raises:
        LeaderboardError: a line is no JSON object with a ``video`` and a number, or names a video twice or one that
            the manifest does not list.
    """
    places: dict[str, tuple[Any, int]] = {}
    taken: set[tuple[Any, int]] = set()
    for entry in read_manifest(run):
        if str(entry["video"]) not in places:
            prompt, sample = entry.get("prompt"), int(entry.get("index", 0))
            while (prompt, sample) in taken:  # the file of prompts has a line twice
                sample += 1
            taken.add((prompt, sample))
            places[str(entry["video"])] = prompt, sample
    prompts = {prompt: prompt_id(str(prompt)) for prompt, _ in places.values()}
    rows = []
    for name in sorted(metrics):
        path = run / "scores" / f"{name}.jsonl"
        if not path.is_file():
            continue
        seen: set[tuple[int, int]] = set()
        for number, line in enumerate(_read(path).splitlines(), 1):
            try:
                row = json.loads(line)
                if row["value"] is None:
                    continue
                prompt, sample = places[row["video"]]
                place = (prompts[prompt], int(sample))
                value = finite(row["value"])
            except (ValueError, KeyError, TypeError) as error:
                raise LeaderboardError(
                    f"Line {number} of {path} is not the score of a video of this run ({type(error).__name__}: "
                    f"{error}); score the run again."
                ) from error
            if place in seen:
                raise LeaderboardError(f"Line {number} of {path} scores {row['video']!r} twice; score the run again.")
            seen.add(place)
            rows.append({"name": name, "prompt": place[0], "sample": place[1], "value": value})
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LeaderboardError(f"{path.parent} is not a finished run: it has no {path.name}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LeaderboardError(f"Cannot read {path}: {error}.") from error


def _section(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise LeaderboardError(f"{path} has no section {key!r}; make the run again with this version.")
    return value


def _maybe(values: dict[str, Any], key: str, kind: type[T], path: Path) -> T | None:
    value = values.get(key)
    if value is None:
        return None
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise LeaderboardError(f"{path} gives {value!r} as {key!r}, which must be {kind.__name__}.") from error


def _need(values: dict[str, Any], key: str, kind: type[T], path: Path) -> T:
    value = _maybe(values, key, kind, path)
    if value is None:
        raise LeaderboardError(f"{path} does not state {key!r}; make the run again with this version.")
    return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _texts(value: Any) -> str:
    """What is added to the name of prompts whose models read other texts (extended ones): those are another test."""
    return f", read as {value.get('name')} {str(value.get('sha256'))[:8]}" if isinstance(value, dict) else ""


def _base(value: Any) -> str | None:
    """The base model's reference, revision and hash as one text."""
    if not isinstance(value, dict):
        return _text(value)
    revision = f" at {value['revision']}" if value.get("revision") else ""
    digest = f", sha256 {value['hash']}" if value.get("hash") else ""
    return f"{value.get('ref')}{revision}{digest}"


def _size(value: Any, path: Path) -> tuple[int | None, int | None]:
    """(height, width) from [height, width] or "480x832" (height first)."""
    if value is None:
        return None, None
    parts = value.split("x") if isinstance(value, str) else value
    try:
        height, width = (int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise LeaderboardError(f"{path} gives the size {value!r}; it must be [height, width].") from error
    return height, width


def _time(value: Any, path: Path) -> datetime:
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise LeaderboardError(f"{path} gives {value!r} as 'created', which must be an ISO 8601 time.") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
