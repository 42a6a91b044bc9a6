"""What the leaderboard takes in besides runs: per-video scores, latency, preferences, claims; and old databases."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, select

from leaderboard.database import open_engine, reading
from leaderboard.errors import LeaderboardError
from leaderboard.models import Base, Claim, Latency, Preference, VideoScore
from leaderboard.query import load
from leaderboard.record import record_claims, record_latency, record_preferences, record_run
from tests.test_leaderboard import STUDENT, TEACHER, make_run

OLD = Path(__file__).parent / "data" / "leaderboard_schema_0001.sql"
HEAD: dict[str, Any] = {
    "command": "tmd-eval latency --ckpt a", "code_revision": "0" * 40, "device": "a CPU",
    "packages": {"torch": "2.14.1"}, "created": "2026-11-20T10:00:00+00:00",
}  # fmt: skip
TIMING: dict[str, Any] = {
    "name": STUDENT, "checkpoint_hash": "c" * 64, "method": "tmd", "role": "student", "m": 2, "n": 2, "h": 2,
    "effective_nfe": 2.4, "guidance": 1.0, "batch": 1, "dtype": "float32", "frames": 9, "height": 32, "width": 32,
    "repeats": 5, "peak_memory_bytes": 6_000_000_000,
    "seconds": {
        part: {"median": 0.1 * i, "p95": 0.2 * i}
        for i, part in enumerate(("text", "backbone", "head", "vae", "write", "total"), 1)
    },
}  # fmt: skip
VOTE: dict[str, Any] = {
    "question": "visual quality", "a": STUDENT, "b": TEACHER, "wins_a": 30, "wins_b": 20, "ties": 2, "value": 0.6,
    "low": 0.5, "high": 0.7, "p_value": 0.04, "n_votes": 52, "n_prompts": 26, "n_raters": 4, "method": "logit",
}  # fmt: skip
STUDY: dict[str, Any] = {
    **{key: value for key, value in HEAD.items() if key != "packages"},
    "study": "pilot", "schedule_hash": "e" * 64, "raters": 5, "votes": 60, "excluded_raters": 1,
    "models": [{"name": STUDENT, "checkpoint_hash": "c" * 64}, {"name": TEACHER, "checkpoint_hash": None}],
    "results": [VOTE, {**VOTE, "question": "prompt alignment"}],
}  # fmt: skip
CLAIM: dict[str, Any] = {
    "claim": "TMD beats DMD2-v at M = 1", "source": "Table 1", "verdict": "undecided", "effect": 0.01, "low": -0.02,
    "high": 0.04, "n": 1024, "seeds": [0, 1, 2],
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def rows(db: str, model: type[Base]) -> list[Any]:
    with reading(db) as session:
        return list(session.scalars(select(model)))


def test_each_videos_score_is_kept_and_replaced(tmp_path: Path) -> None:
    run, db = make_run(tmp_path, TEACHER), str(tmp_path / "r.db")
    lines = [{"video": f"{i:05d}-0.mp4", "value": i / 4 if i else None, "extra": {}} for i in range(4)]
    scores = run / "scores" / "alignment_joint.jsonl"
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        record_run(db, run)
        assert sorted(row.value for row in rows(db, VideoScore)) == [0.25, 0.5, 0.75]
    scores.write_text(json.dumps(lines[1]) + "\n" + json.dumps(lines[1]) + "\n")
    with pytest.raises(LeaderboardError, match=r"Line 2 of .* scores '00001-0\.mp4' twice"):
        record_run(db, run)
    for value in (float("nan"), "high"):
        scores.write_text(json.dumps({**lines[1], "value": value}))
        with pytest.raises(LeaderboardError, match=r"Line 1 of .*alignment_joint\.jsonl"):
            record_run(db, run)
    assert len(rows(db, VideoScore)) == 3  # nothing lost


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("frechet", {"value": -1.0}, "frechet is -1.0, but it cannot be negative"),
        ("imaging_quality", {"value": 61.0}, "imaging_quality is 61.0, but scores are between 0 and 1"),
        ("imaging_qualty", {}, "did you mean 'imaging_quality'"),
        ("frechet", {"low": 0.9, "high": 0.1}, "ends are swapped"),
        ("frechet", {"completeness": 1.5}, "completeness 1.5"),
    ],
)
def test_impossible_scores_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path, TEACHER, prompts=1)
    entry = {"n": 1, "value": 0.5, "completeness": 1, "metric_version": "1", "weight_hashes": {}, **changes}
    write(run / "scores" / "summary.json", {name: entry})
    with pytest.raises(LeaderboardError, match=message):
        record_run(str(tmp_path / "r.db"), run)


def test_latency_is_recorded_once(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    path = write(tmp_path / "latency.json", {**HEAD, "rows": [TIMING, {**TIMING, "batch": 4}]})
    assert record_latency(db, path) == record_latency(db, tmp_path) == [1, 2]
    first, second = rows(db, Latency)
    assert (first.batch, second.batch, first.device) == (1, 4, "a CPU")
    assert first.seconds["head"] == {"median": pytest.approx(0.3), "p95": pytest.approx(0.6)}
    assert first.peak_memory_bytes == 6_000_000_000 and first.packages == {"torch": "2.14.1"}


def test_preferences_are_recorded_once(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    assert record_preferences(db, write(tmp_path / "preferences.json", STUDY)) == [1, 2]
    again = {**STUDY, "results": [{**VOTE, "value": 0.55}]}
    assert record_preferences(db, write(tmp_path / "preferences.json", again)) == [1]
    first, second = rows(db, Preference)
    assert (first.value, first.a_hash, first.b_hash, first.simulated) == (0.55, "c" * 64, None, False)
    assert (second.question, second.excluded_raters) == ("prompt alignment", 1)


def test_a_new_report_replaces_its_claims(tmp_path: Path) -> None:
    db = str(tmp_path / "r.db")
    for folder in ("one", "two"):
        write(tmp_path / folder / "report.json", {**HEAD, "rows": [], "claims": [CLAIM, {**CLAIM, "claim": "x"}]})
        record_claims(db, tmp_path / folder)
    write(tmp_path / "one" / "report.json", {**HEAD, "rows": [], "claims": [{**CLAIM, "verdict": "holds"}]})
    assert record_claims(db, tmp_path / "one") == [1]
    assert [(c.report, c.claim, c.verdict) for c in rows(db, Claim)] == [
        ("one", CLAIM["claim"], "holds"), ("two", CLAIM["claim"], "undecided"), ("two", "x", "undecided"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "content", "message"),
    [
        (record_latency, {**HEAD, "rows": [{**TIMING, "seconds": {"total": {"median": -1}}}]}, "never negative"),
        (record_latency, {**HEAD, "rows": [{**TIMING, "seconds": {"gpu": {"median": 1}}}]}, "unknown part 'gpu'"),
        (record_latency, {**HEAD, "rows": [TIMING, TIMING]}, "Two of the 2 rows are alike"),
        (record_latency, {"rows": []}, "lacks 'created'"),
        (record_latency, [], "is not a latency file"),
        (record_preferences, {**STUDY, "results": [{**VOTE, "value": 60}]}, "share between 0 and 1"),
        (record_preferences, {**STUDY, "results": [{**VOTE, "wins_a": -3}]}, "negative count"),
        (record_preferences, {**STUDY, "study": None, "results": 3}, "not a file of preferences"),
        (record_claims, {**HEAD, "claims": [{**CLAIM, "verdict": "maybe"}]}, "'maybe' is none of"),
        (record_claims, {**HEAD, "claims": [{**CLAIM, "effect": float("nan")}]}, "nan is not a finite number"),
        (record_claims, {**HEAD, "rows": []}, "lacks 'claims'"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, record: Any, content: Any, message: str) -> None:
    path = write(tmp_path / "report" / "report.json", content)
    db = str(tmp_path / "r.db")
    with pytest.raises(LeaderboardError, match=message):
        record(db, path)
    with pytest.raises(LeaderboardError, match="There is no"):
        record(db, tmp_path / "absent.json")


def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(OLD.read_text())
        before = connection.execute("SELECT id, name, effective_nfe, command FROM results ORDER BY id").fetchall()
        scores = connection.execute("SELECT count(*), sum(value) FROM metrics").fetchone()
    loaded = load(str(path))
    assert [(row.id, row.name, row.effective_nfe, row.command) for row in loaded] == before and len(before) == 4
    values = [metric.value for row in loaded for metric in row.metrics]
    assert (len(values), sum(values)) == (scores[0], pytest.approx(scores[1]))
    engine = open_engine(str(path))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    with reading(str(path)) as session:
        assert session.scalar(select(func.count()).select_from(VideoScore)) == 0
    engine.dispose()


def test_every_field_of_the_schema_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "leaderboard.md").read_text()
    for table in Base.metadata.sorted_tables:
        section = text.split(f"### `{table.name}`")[1].split("### `")[0]
        documented = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")][1:]
        assert sorted(documented) == sorted(column.name for column in table.columns)


def test_a_damaged_database_is_one_sentence(tmp_path: Path) -> None:
    db = tmp_path / "r.db"
    record_run(str(db), make_run(tmp_path, TEACHER, prompts=1))
    with sqlite3.connect(db) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'results'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(db.read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    db.write_bytes(content)
    with pytest.raises(LeaderboardError, match=r"Cannot use the database .*r\.db: .*malformed"):
        load(str(db))
