"""The database of the studies: one engine for the life of a server, writers one after another.

SQLite allows one writer at a time, and its busy timeout polls, so that some would wait long: within a process a lock
makes the queue fair. Commits are synced (``synchronous=FULL``): a vote that was acknowledged survives a power cut.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import Session

from leaderboard.database import WRITE, connect, migrate
from studies.errors import StudyError
from studies.models import VERSION_TABLE, Study


class Database:
    """A database with the studies' tables at their newest schema.

    Args:
        db: URL or path; None for ``TMD_EVAL_DB`` or ./tmd-eval.db.

    Raises:
        LeaderboardError: the address is wrong, the database cannot be opened, or it is newer than the code.
    """

    def __init__(self, db: str | None = None) -> None:
        self.engine = connect(db)
        self.sqlite = self.engine.dialect.name == "sqlite"
        if self.sqlite:
            event.listen(self.engine, "connect", _synced)
        migrate(self.engine, Path(__file__).with_name("migrations"), version_table=VERSION_TABLE)
        self._writing = self.engine.execution_options(**{WRITE: True})
        self._queue = threading.Lock()

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end, rolled back on any exception."""
        with (
            self._queue if self.sqlite else nullcontext(),
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def find_study(session: Session, name: str, schedule_hash: str, shown: str) -> Study:
    """The row of a study folder.

    Raises:
        StudyError: the database has no such study, or one of the same name with another schedule.
    """
    study = session.scalars(select(Study).where(Study.name == name)).one_or_none()
    if study is None:
        raise StudyError(f"{shown} has no study {name!r}; name the database it was created in with --db.")
    if study.schedule_hash != schedule_hash:
        raise StudyError(
            f"The study {name!r} in {shown} has another schedule than this folder ({study.schedule_hash[:12]} against "
            f"{schedule_hash[:12]}); name its own database with --db, or its own folder."
        )
    return study


def _synced(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous=FULL")
