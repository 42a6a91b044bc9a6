"""Bundles: rows of a board as one zip file with hashes and thumbnails, for another lab's board to take in.

A bundle holds manifest.json (format, lab, the SHA-256 of every other file), rows.json and thumbnails/. Nothing in it is
trusted: names, sizes, hashes, types and ranges are checked before the first row is stored, and all is stored or
nothing. What a hash of the whole file is good for only its sender can say, so export prints it and import takes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from leaderboard import record
from leaderboard.board import columns as teacher_first
from leaderboard.checks import TOTALS, check_metric, finite, without_lone_totals
from leaderboard.clips import contact_sheet
from leaderboard.database import reading, writing
from leaderboard.errors import LeaderboardError
from leaderboard.models import (
    ROLES,
    Base,
    Claim,
    Latency,
    Preference,
    Reported,
    Result,
    Thumbnail,
    UtcDateTime,
    VideoScore,
)  # fmt: skip
from leaderboard.page import write_file

FORMAT = 1
LARGEST_FILE, LARGEST_PICTURE = 512 * 2**20, 2**20
"""Bytes of rows.json and of a thumbnail after unpacking, at most."""
THUMBNAILS = 4
"""Thumbnails a row."""
TABLES: dict[str, type[Base]] = {
    "results": Result, "reported": Reported, "latencies": Latency, "preferences": Preference, "claims": Claim,
}  # fmt: skip
DAMAGE = (
    *(ValueError, TypeError, AttributeError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error),
    *(RecursionError, NotImplementedError),
)
"""What reading a bundle raises that is damaged, encrypted, or made to do harm."""
LARGEST_INTEGER = 2**63 - 1
_LOCAL = frozenset({"id", "run", "origin"})
_NAME = re.compile(r"rows\.json|thumbnails/[0-9a-f]{64}-\d+\.(?:png|webp)")


def export_bundle(db_url: str | None, out: Path, *, rows: Iterable[int] | None = None, lab: str = "") -> dict[str, Any]:
    """Write a bundle: all of a board, or some measured rows.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        out: the zip file.
        rows: ids of measured rows; by default all of them and everything else in the database.
        lab: who sends it, said on the pages of those who import it.

    Returns:
        "rows", the number of rows, and "sha256" of the file.

    Raises:
        LeaderboardError: an unknown id, nothing to export, or a clip that cannot be read.
    """
    from leaderboard.query import load

    results = load(db_url, rows=rows)
    files: dict[str, bytes] = {}
    with reading(db_url) as session:
        content: dict[str, list[dict[str, Any]]] = {"results": [_result(session, row, files) for row in results]}
        for name, model in TABLES.items():
            if name != "results" and rows is None:
                content[name] = [_plain(row) for row in session.scalars(select(model).order_by(model.__table__.c.id))]
    count = sum(map(len, content.values()))
    if not count:
        raise LeaderboardError("There is nothing to export: the database has no rows.")
    files["rows.json"] = _dump(content)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    files["manifest.json"] = _dump({"format": FORMAT, "lab": lab, "files": hashes})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):  # a fixed date: the same rows give the same bytes
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, packed.getvalue())
    return {"rows": count, "sha256": hashlib.sha256(packed.getvalue()).hexdigest()}


def import_bundle(db_url: str | None, path: Path, *, sha256: str | None = None) -> dict[str, int]:
    """Take a bundle in, all of it or nothing.

    Args:
        db_url: database URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.
        path: the zip file.
        sha256: what the sender says the file's SHA-256 is; compared where given.

    Returns:
        Numbers of rows: "added"; "unchanged" were here already; "kept" differ from those here, which were kept.

    Raises:
        LeaderboardError: the file is no bundle, was changed, or holds something impossible.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LeaderboardError(f"Cannot read {path}: {error}.") from error
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and sha256.lower() != digest:
        raise LeaderboardError(f"{path} has the SHA-256 {digest}, not {sha256}: it was changed on its way.")
    try:
        lab, content, pictures = _unpack(path, data)
        stored = {name: [_row(name, row, pictures) for row in content.get(name, [])] for name in TABLES}
    except KeyError as error:
        raise LeaderboardError(f"{path} is not a bundle of results: it lacks {error}.") from error
    except DAMAGE as error:
        raise LeaderboardError(f"{path} cannot be imported: {error}.") from error
    counts = dict.fromkeys(("added", "unchanged", "kept"), 0)
    origin = f"{lab or 'a bundle'} (sha256 {digest[:12]})"
    with writing(db_url) as session:
        for name, model in TABLES.items():
            known: dict[str, Any] = {row.key: row for row in session.scalars(select(model))}  # type: ignore[attr-defined]
            for row in stored[name]:
                if row["key"] in known:
                    here = known[row["key"]]
                    old = _result(session, here, None) if name == "results" else _plain(here)
                    counts["unchanged" if _same(old, row) else "kept"] += 1
                    continue
                known[row["key"]] = None
                counts["added"] += 1
                if name == "results":
                    _store(session, row, origin, pictures)
                else:
                    session.add(model(**row, origin=origin))
        session.flush()
    return counts


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    plain = json.dumps({**new, "thumbnails": None}, sort_keys=True, default=_time)
    return json.dumps({**old, "thumbnails": None}, sort_keys=True, default=_time) == plain


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat()


def _dump(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, allow_nan=False, default=_time) + "\n").encode()


def _plain(row: Any) -> dict[str, Any]:
    return {c.key: getattr(row, c.key) for c in type(row).__table__.columns if c.key not in _LOCAL}


def _result(session: Session, row: Result, files: dict[str, bytes] | None) -> dict[str, Any]:
    """A result with its metrics and videos' scores; its thumbnails go into ``files``, if that is not None."""
    import base64

    query = select(VideoScore.name, VideoScore.prompt, VideoScore.sample, VideoScore.value)
    query = query.where(VideoScore.result_id == row.id).order_by(VideoScore.name, VideoScore.prompt, VideoScore.sample)
    videos: dict[str, list[list[float]]] = {}
    for metric_name, number, sample, value in session.execute(query):
        videos.setdefault(metric_name, []).append([number, sample, value])
    metrics = {metric.name: metric.to_dict() for metric in row.metrics}
    content = {**_plain(row), "metrics": metrics, "video_scores": videos, "thumbnails": []}
    if files is None:
        return content
    own = select(Thumbnail).where(Thumbnail.result_id == row.id).order_by(Thumbnail.position)
    pictures = [(thumbnail.prompt, thumbnail.image) for thumbnail in session.scalars(own)]
    if not pictures and row.run and (Path(row.run) / "manifest.jsonl").is_file():
        sheet = contact_sheet(teacher_first([row]), {row.id: Path(row.run)}, prompts=THUMBNAILS)
        for prompt, (clip,) in sheet.rows if sheet else ():
            pictures.append((prompt, base64.b64decode(clip.strip.split(",", 1)[1])))
    for position, (prompt, image) in enumerate(pictures):
        ending = "png" if image.startswith(b"\x89PNG") else "webp"
        name = f"thumbnails/{row.key}-{position}.{ending}"
        files[name] = image
        content["thumbnails"].append({"prompt": prompt, "file": name})
    return content


def _unpack(path: Path, data: bytes) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    """Lab, rows and thumbnails, after every name, size and hash was checked. Nothing is written to the disk."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("it holds a file twice")
        if sum(entry.file_size for entry in entries.values()) > LARGEST_FILE:
            raise ValueError(f"it would unpack to more than {LARGEST_FILE} bytes, which is too large")
        for name, entry in entries.items():
            if name != "manifest.json" and not _NAME.fullmatch(name):
                raise ValueError(f"it holds {name!r}, and no bundle has such a file")
            if name.startswith("thumbnails/") and entry.file_size > LARGEST_PICTURE:
                raise ValueError(f"{name} would unpack to {entry.file_size} bytes, which is too large")
        manifest = json.loads(archive.read("manifest.json"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']!r}, and this version of tmd-eval reads {FORMAT}")
        hashes = manifest["files"]
        if set(hashes) != set(entries) - {"manifest.json"}:
            raise ValueError("its files are not those of its manifest")
        files = {name: archive.read(name) for name in hashes}
    for name, expected in hashes.items():
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise ValueError(f"{name} was changed: its SHA-256 is not that of the manifest")
    content = json.loads(files.pop("rows.json"), parse_constant=_no_constant)
    if unknown := set(content) - set(TABLES):
        raise ValueError(f"it has rows of an unknown kind {sorted(unknown)[0]!r}")
    for name, image in files.items():
        _check_picture(name, image)
    return str(manifest["lab"])[:200], content, files


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _check_picture(name: str, image: bytes) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image), formats=("PNG", "WEBP")) as picture:
            width, height = picture.size
            picture.verify()
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise ValueError(f"{name} is no picture") from error
    if width > 4096 or height > 4096:
        raise ValueError(f"{name} has {width} x {height} pixels, which is too large")


def _row(table: str, row: Mapping[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """The columns of a row, each of its type and in its range, with a key that fits its content."""
    values = {c.key: _typed(c, row[c.key]) for c in TABLES[table].__table__.columns if c.key not in _LOCAL}
    identity: Sequence[str]
    if table == "results":
        if values["role"] not in ROLES:
            raise ValueError(f"the role {values['role']!r} is none of {', '.join(ROLES)}")
        values["source"] = "measured"
        values["seeds"] = [int(seed) for seed in values["seeds"]]
        values["packages"] = {str(key): str(version) for key, version in values["packages"].items()}
        metrics = without_lone_totals([check_metric(name, entry) for name, entry in sorted(row["metrics"].items())])
        values["metrics"] = {m["name"]: {key: value for key, value in m.items() if key != "name"} for m in metrics}
        values["video_scores"] = {
            str(name): _video_scores(str(name), scores) for name, scores in row["video_scores"].items()
        }
        values["thumbnails"] = [{"prompt": str(t["prompt"]), "file": str(t["file"])} for t in row["thumbnails"]]
        named = [thumbnail["file"] for thumbnail in values["thumbnails"]]
        if len(named) > THUMBNAILS or len(set(named)) < len(named) or not set(named) <= set(pictures):
            raise ValueError(f"{values['name']} names thumbnails that are not its own, or more than {THUMBNAILS}")
        identity = record.IDENTITY
    elif table == "reported":
        values["scores"] = {str(name): finite(value) for name, value in values["scores"].items()}
        if any(not 0 <= value <= 100 for value in values["scores"].values()):
            raise ValueError(f"{values['teacher']} {values['method']} has a score outside 0 to 100")
        from leaderboard.published import IDENTITY as identity
    else:
        check, identity = record.CHECKS[table]
        values |= check(row) | ({key: values[key] for key in ("a_hash", "b_hash")} if table == "preferences" else {})
    if record.key_of([values[name] for name in identity]) != values["key"]:
        raise ValueError(f"the key of {values.get('name') or values.get('claim') or table} is not that of its content")
    return values


def _video_scores(name: str, scores: Any) -> list[list[int | float]]:
    found: list[list[int | float]] = [[_integer(prompt), _integer(n), finite(value)] for prompt, n, value in scores]
    if len({(prompt, n) for prompt, n, _ in found}) < len(found):
        raise ValueError(f"{name} scores one video twice")
    return found


def _integer(value: Any) -> int:
    """The value as a whole number that a database can hold."""
    if abs(int(value)) > LARGEST_INTEGER:
        raise ValueError(f"{value} is too large a number")
    return int(value)


def _typed(column: Any, value: Any) -> Any:
    kind = datetime if isinstance(column.type, UtcDateTime) else column.type.python_type
    if value is None:
        if not column.nullable and kind is not dict:
            raise ValueError(f"{column.key} is missing in a row of {column.table.name}")
        return None
    if kind is datetime:
        time = datetime.fromisoformat(value)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    if kind is float:
        number = finite(value)
        if number < 0 and column.key not in ("effect", "low", "high", "value", *TOTALS):
            raise ValueError(f"{column.key} is {number}, but it cannot be negative")
        return number
    if kind is not dict and not (isinstance(value, kind) and (kind is bool) == isinstance(value, bool)):
        raise ValueError(f"{column.key} is {repr(value)[:60]}, which is no {kind.__name__}")
    return _integer(value) if kind is int else value


def _store(session: Session, row: Mapping[str, Any], origin: str, pictures: Mapping[str, bytes]) -> None:
    columns = {key: value for key, value in row.items() if key not in ("metrics", "video_scores", "thumbnails")}
    metrics = [{"name": name, **metric} for name, metric in row["metrics"].items()]
    videos = [
        {"name": name, "prompt": prompt, "sample": sample, "value": value}
        for name, scores in row["video_scores"].items()
        for prompt, sample, value in scores
    ]
    result = record.store_result(session, {**columns, "run": "", "origin": origin}, metrics, videos)
    thumbnails = [
        {"result_id": result, "position": i, "prompt": t["prompt"], "image": pictures[t["file"]]}
        for i, t in enumerate(row["thumbnails"])
    ]
    if thumbnails:
        session.execute(insert(Thumbnail), thumbnails)
