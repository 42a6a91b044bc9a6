"""What goes wrong in a study that runs for days: full disk, locked or newer database, lost clips, clock set back."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from typer.testing import CliRunner

from studies.app import Server, build_app
from studies.clock import Clock
from studies.create import create_study, plan_study
from studies.database import Database
from studies.design import QUESTIONS
from studies.errors import DatabaseUnusableError, StudyError
from studies.files import DiskFullError
from studies.models import VERSION_TABLE, Study, Vote
from studies.serving import open_folder
from tests.studykit import make_set, make_study, prompts
from tmd_eval.cli import app as command_line

BALLOT = {
    "answers": dict.fromkeys(QUESTIONS, "left"), "seconds": dict.fromkeys(QUESTIONS, 1.0),
    "watched": {"left": 1, "right": 1}, "replays": 0, "slow": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return make_study(
        tmp_path_factory.mktemp("made"), count=6, seeds=2, votes_per_item=4, trials_per_rater=6, catch_share=0.0,
        practice_trials=0,
    )  # fmt: skip


@pytest.fixture
def study(made: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """A copy of the study, each test's own."""
    sqlite3.connect(made[1]).execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(made[0], tmp_path / "study")
    return tmp_path / "study", str(shutil.copy(made[1], tmp_path / "votes.db"))


class Wall:
    """A machine's clock that is set by hand; what really passed is told to nobody."""

    def __init__(self) -> None:
        self.at = 1.8e9

    def __call__(self) -> float:
        return self.at


def join(app: FastAPI, name: str) -> tuple[TestClient, dict[str, Any]]:
    client = TestClient(app, raise_server_exceptions=False)
    state = client.post("/api/enter", json={"params": {"rater": name}}).json()
    return client, client.post("/api/consent", json={"agree": True, "consent": state["consent"]}).json()


def votes(server: Server) -> int:
    with server.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Vote)) or 0


def test_a_full_disk_is_a_polite_503_and_loses_nothing(study: tuple[Path, str]):
    wall = Wall()
    server = Server(open_folder(study[0]), study[1], Clock(wall=wall))
    app = build_app(server)
    raters = [join(app, f"worker {number}") for number in range(8)]

    def limit(pages: int) -> None:
        """No page more than these: SQLite then says what it says on a full disk."""
        for engine in (server.database.engine, server.database._unsynced_engine):
            with engine.connect() as connection:
                connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    with server.database.engine.connect() as connection:
        limit(int(connection.exec_driver_sql("PRAGMA page_count").scalar_one()))
    full = stored = 0
    for client, state in raters:
        while state["stage"] == "trial":
            for side in ("left", "right"):
                assert client.get("/" + state["trial"][side]).status_code == 200
            wall.at = server.clock.now().timestamp() + 2
            url = f"/api/trial/{state['trial']['token']}/vote"
            answer = client.post(url, json=BALLOT)
            if answer.status_code == 503:
                assert answer.json() == {"error": "retry"} and answer.headers["retry-after"]
                assert votes(server) == stored, "nothing half stored, nothing lost"
                full += 1
                limit(1_000_000)
                answer = client.post(url, json=BALLOT)
            assert answer.status_code == 200, answer.text
            stored += 1
            assert votes(server) == stored
            state = answer.json()["next"]
    assert full > 0, "the disk was never full"


def test_create_on_a_full_disk_says_so_and_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos = {name: make_set(tmp_path / name, prompts(3), shade=shade) for shade, name in enumerate("ab")}
    settings = {"name": "s", "seeds": 2, "trials_per_rater": 2, "catch_share": 0.0, "practice_trials": 0}
    plan, db = plan_study(videos, settings, num_prompts=3), str(tmp_path / "votes.db")
    left = [5]

    def fsync(file: int, real: Any = os.fsync) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError, match=r"disk is full.*run the same command again"):
        create_study(plan, tmp_path / "study", db, command="c")
    assert not (tmp_path / "study" / "study.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "study" / "clips").iterdir()}
    assert len(kept) == 4 and not [name for name in kept if name.startswith(".tmp")]
    monkeypatch.undo()
    create_study(plan, tmp_path / "study", db, command="c")
    assert {name: (tmp_path / "study" / "clips" / name).stat().st_mtime_ns for name in kept} == kept
    Server(open_folder(tmp_path / "study"), db)


def test_a_locked_database_is_one_sentence_on_the_command_line(study: tuple[Path, str]):
    database = Database(study[1])
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=50")
    other = sqlite3.connect(study[1], isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnusableError) as caught, database.writing() as session:
        session.connection()
    assert "database is locked" in str(caught.value) and "\n" not in str(caught.value)
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Study)) == 1, "readers go on"
    other.execute("ROLLBACK")
    with database.writing() as session:
        assert session.scalar(select(func.count()).select_from(Study)) == 1
    database.close()


@pytest.mark.parametrize("words", [["status"], ["serve"], ["analyze"], ["unblind", "--reason", "r"]])
def test_a_database_from_a_newer_version_or_none_at_all_is_refused(words: list[str], study: tuple[Path, str]):
    connection = sqlite3.connect(study[1])
    connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.commit()
    broken = study[0] / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    for db, sentence in ((study[1], "upgrade tmd-eval"), (str(broken), "Cannot open the database")):
        before = Path(db).read_bytes()
        result = CliRunner().invoke(command_line, ["study", words[0], str(study[0]), *words[1:], "--db", db])
        assert getattr(result.exception, "exit_code", None) == 2 and sentence in str(result.exception)
        assert "\n" not in str(result.exception) and Path(db).read_bytes() == before


def test_a_taken_port_is_one_sentence(study: tuple[Path, str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["study", "serve", str(study[0]), "--db", study[1], "--port", port]
        result = CliRunner().invoke(command_line, words)
    assert getattr(result.exception, "exit_code", None) == 2 and "another --port" in str(result.exception)


def test_lost_clips_stop_the_start_and_pause_a_running_study(study: tuple[Path, str]):
    server = Server(open_folder(study[0]), study[1])
    client, state = join(build_app(server), "worker")
    clips = sorted((study[0] / "clips").iterdir())
    for clip in clips:
        clip.rename(clip.with_suffix(".away"))
    answer = client.get("/" + state["trial"]["left"])
    assert (answer.status_code, answer.json()) == (503, {"error": "retry"})
    with pytest.raises(StudyError, match=rf"{len(clips)} clips are missing .* created the study again"):
        Server(open_folder(study[0]), study[1])
    for clip in clips:
        clip.with_suffix(".away").rename(clip)
    assert client.get("/" + state["trial"]["left"]).status_code == 200


def test_a_clock_set_back_between_trial_and_vote_loses_no_vote(study: tuple[Path, str]):
    wall = Wall()
    server = Server(open_folder(study[0]), study[1], Clock(wall=wall))
    client, state = join(build_app(server), "worker")
    for hours in (0, 5, 48):
        for side in ("left", "right"):
            assert client.get("/" + state["trial"][side]).status_code == 200
        wall.at -= 3600 * hours
        time.sleep(0.6)  # what really passed still counts: a clip lasts half a second
        answer = client.post(f"/api/trial/{state['trial']['token']}/vote", json=BALLOT)
        assert answer.status_code == 200, answer.text
        state = answer.json()["next"]
    with server.database.reading() as session:
        rows = session.scalars(select(Vote).order_by(Vote.trial_id)).all()
    assert len(rows) == 3 and all(0.5 <= row.seconds_total < 60 for row in rows)
    assert [row.created for row in rows] == sorted(row.created for row in rows)
    # set back while the server was down: its clock goes on from what the database has seen
    server.database.close()
    restarted = Server(open_folder(study[0]), study[1])
    assert restarted.clock.now() >= max(row.created for row in rows) > datetime.now(UTC)
