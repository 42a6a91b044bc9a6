"""Into the database: runs, timings, preferences and claims; recording the same thing again updates its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import and_, delete, insert, select
from sqlalchemy.orm import Session

from leaderboard.checks import both_ends, finite
from leaderboard.database import writing
from leaderboard.errors import LeaderboardError
from leaderboard.models import Claim, Latency, Metric, Preference, Result, VideoScore
from leaderboard.run_folder import IDENTITY, read_manifest, read_run, video_scores

__all__ = ["IDENTITY", "read_manifest", "record_claims", "record_latency", "record_preferences", "record_run"]

Evidence = TypeVar("Evidence", Latency, Preference, Claim)
PARTS = ("text", "backbone", "head", "vae", "write", "total")
"""Parts of a latency."""


def record_run(db_url: str | None, run: Path, *, name: str | None = None) -> int:
    """Record a run's settings, provenance and scores; recording the same run again updates its row.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        run: folder with config.yaml, manifest.jsonl and, once scored, scores/summary.json.
        name: name people see; by default that of the method and its steps (``display.default_name``).

    Returns:
        The row's id.

    Raises:
        LeaderboardError: a file is missing or malformed, or the database cannot be opened.
    """
    run = Path(run)
    columns, metrics = read_run(run, name=name)
    videos = video_scores(run, (metric["name"] for metric in metrics))
    with writing(db_url) as session:
        return store_result(session, {**columns, "origin": None}, metrics, videos)


def store_result(
    session: Session,
    columns: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    videos: Sequence[Mapping[str, Any]],
) -> int:
    """Insert a result with its metrics and its videos' scores, or replace those of the result with the same key."""
    result = session.scalars(select(Result).where(Result.key == columns["key"])).one_or_none()
    if result is None:
        result = Result()
        session.add(result)
    for column, value in columns.items():
        setattr(result, column, value)
    result.metrics.clear()
    session.flush()  # the old metrics go before new ones of the same name come
    result.metrics.extend(Metric(**metric) for metric in metrics)
    session.flush()
    session.execute(delete(VideoScore).where(VideoScore.result_id == result.id))
    if videos:
        session.execute(insert(VideoScore), [{"result_id": result.id, **video} for video in videos])
    return result.id


def record_latency(db_url: str | None, path: Path) -> list[int]:
    """Record the rows of a latency.json; recording it again updates them.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        path: the file, or its folder.

    Returns:
        Ids of the rows, in the order of the file.

    Raises:
        LeaderboardError: the file is missing or malformed.
    """
    path = _file(path, "latency.json")

    def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
        common = _provenance(content) | {
            "packages": {str(key): str(value) for key, value in (content.get("packages") or {}).items()}
        }
        return [_latency(row) | common for row in content["rows"]]

    found = _parse(path, rows, "a latency file")
    return _store(db_url, Latency, found, CHECKS["latencies"][1])


def record_preferences(db_url: str | None, path: Path) -> list[int]:
    """Record the results of a preferences.json (``tmd-eval study analyze``); a new analysis replaces the old.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        path: the file, or its folder.

    Returns:
        Ids of the rows, in the order of the file.

    Raises:
        LeaderboardError: the file is missing or malformed.
    """
    path = _file(path, "preferences.json")

    def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
        hashes = {model["name"]: _text(model.get("checkpoint_hash")) for model in content["models"]}
        excluded = content.get("excluded_raters") or 0
        common = {
            "study": str(content["study"]),
            "schedule_hash": str(content["schedule_hash"]),
            "excluded_raters": excluded if isinstance(excluded, int) else len(excluded),
            "simulated": bool(content.get("simulated", False)),
            **{key: value for key, value in _provenance(content).items() if key != "device"},
        }
        return [_preference(row, hashes) | common for row in content["results"]]

    found = _parse(path, rows, "a file of preferences")
    return _store(db_url, Preference, found, CHECKS["preferences"][1])


def record_claims(db_url: str | None, report_folder: Path, *, name: str | None = None) -> list[int]:
    """Record the claims of a report; a new report of the same name replaces the old one's claims.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        report_folder: folder with a report.json that has ``claims``.
        name: of the report; by default that of its folder.

    Returns:
        Ids of the rows, in the order of the report.

    Raises:
        LeaderboardError: the file is missing or malformed, or has no claims.
    """
    path = _file(report_folder, "report.json")
    report = name or path.resolve().parent.name

    def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
        common = {
            "report": report,
            **{key: str(content.get(key) or "") for key in ("device", "code_revision", "command")},
        }
        return [_claim(row) | common for row in content["claims"]]

    found = _parse(path, rows, "a report with claims")
    ours = and_(Claim.report == report, Claim.origin.is_(None))  # another lab may have a report of this name
    return _store(db_url, Claim, found, CHECKS["claims"][1], replaces=ours)


def key_of(values: Sequence[Any]) -> str:
    """SHA-256 of what identifies a row."""
    return hashlib.sha256(json.dumps(list(values), default=str).encode()).hexdigest()


def _store(
    db_url: str | None,
    model: type[Evidence],
    rows: list[dict[str, Any]],
    identity: Sequence[str],
    replaces: Any = None,
) -> list[int]:
    """Insert or update rows by their key, in one transaction; ``replaces`` selects rows that go first.

    A row that had come in a bundle is one recorded here from now on.
    """
    for row in rows:
        row["key"] = key_of([row[name] for name in identity])
    if len({row["key"] for row in rows}) < len(rows):
        raise LeaderboardError(f"Two of the {len(rows)} rows are alike in {', '.join(identity)}; leave one out.")
    with writing(db_url) as session:
        if replaces is not None:
            session.execute(delete(model).where(replaces, model.key.not_in([row["key"] for row in rows])))
        entries = []
        for row in rows:
            entry = session.scalars(select(model).where(model.key == row["key"])).one_or_none()
            if entry is None:
                entry = model()
                session.add(entry)
            for column, value in {**row, "origin": None}.items():
                setattr(entry, column, value)
            entries.append(entry)
        session.flush()
        return [entry.id for entry in entries]


def _file(path: Path, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _parse(path: Path, rows: Callable[[dict[str, Any]], list[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    try:
        return rows(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise LeaderboardError(f"There is no {path}.") from error
    except KeyError as error:
        raise LeaderboardError(f"{path} is not {what}: it lacks {error}.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LeaderboardError(f"{path} is not {what} ({type(error).__name__}: {error}).") from error


def _provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    created = datetime.fromisoformat(str(content["created"]))
    return {
        "command": str(content["command"]),
        "code_revision": str(content["code_revision"]),
        "device": str(content.get("device") or ""),
        "created": (created if created.tzinfo else created.replace(tzinfo=UTC)).astimezone(UTC),
    }


def _latency(row: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := set(row["seconds"]) - set(PARTS):
        raise ValueError(f"{row['name']} times an unknown part {sorted(unknown)[0]!r}; known are {', '.join(PARTS)}")
    seconds = {
        part: {key: _positive(value, f"{row['name']}, {part}, {key}") for key, value in times.items()}
        for part, times in row["seconds"].items()
        if times is not None
    }
    if "median" not in seconds["total"]:
        raise KeyError("seconds.total.median")
    return {
        "seconds": seconds,
        **{key: str(row[key]) for key in ("name", "method", "role")},
        **{key: _text(row.get(key)) for key in ("checkpoint_hash", "dtype")},
        **{key: _int(row.get(key)) for key in ("m", "n", "h", "frames", "height", "width", "peak_memory_bytes")},
        **{key: None if row.get(key) is None else finite(row[key]) for key in ("effective_nfe", "guidance")},
        "batch": int(row["batch"]),
        "repeats": int(row["repeats"]),
    }


def _preference(row: Mapping[str, Any], hashes: Mapping[str, str | None]) -> dict[str, Any]:
    numbers = {key: None if row.get(key) is None else finite(row[key]) for key in ("low", "high", "p_value")}
    value = finite(row["value"])
    both_ends(f"the preference for {row['a']}", numbers["low"], numbers["high"])
    if not 0 <= value <= 1:
        raise ValueError(f"the preference for {row['a']} is {value}, but it is a share between 0 and 1")
    counts = {key: int(row[key]) for key in ("wins_a", "wins_b", "ties", "n_votes", "n_prompts", "n_raters")}
    if min(counts.values()) < 0:
        raise ValueError(f"{row['a']} against {row['b']} has a negative count")
    return {
        **{key: str(row[key]) for key in ("question", "a", "b", "method")},
        "a_hash": hashes.get(row["a"]),
        "b_hash": hashes.get(row["b"]),
        "value": value,
        **counts,
        **numbers,
    }


def _preference_alone(row: Mapping[str, Any]) -> dict[str, Any]:
    return _preference(row, {})


def _claim(row: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = ("holds", "does not hold", "undecided")
    if row["verdict"] not in verdicts:
        raise ValueError(f"the verdict {row['verdict']!r} is none of {', '.join(verdicts)}")
    return {
        **{key: str(row[key]) for key in ("claim", "source", "verdict")},
        **{key: None if row.get(key) is None else finite(row[key]) for key in ("effect", "low", "high")},
        "n": _int(row.get("n")),
        "seeds": row.get("seeds"),
    }


def _positive(value: Any, what: str) -> float:
    number = finite(value)
    if number < 0:
        raise ValueError(f"{what} is {number} seconds, but time is never negative")
    return number


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


CHECKS: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "latencies": (
        _latency,
        ("name", "checkpoint_hash", "m", "n", "h", "batch", "dtype", "device", "created", "height", "width", "frames"),
    ),
    "preferences": (_preference_alone, ("study", "schedule_hash", "question", "a", "b")),
    "claims": (_claim, ("report", "claim", "source")),
}
"""For each table, what checks a row's numbers, and the columns that tell two rows apart."""
