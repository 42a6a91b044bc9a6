"""The database of the studies: one engine for the life of a server, writers one after another.

SQLite allows one writer at a time, and its busy timeout polls, so that some would wait long: within a process a lock
makes the queue fair. Commits are synced (``synchronous=FULL``): a vote that was acknowledged survives a power cut. Each
sync takes milliseconds in which nobody else writes, so that marks which may be lost in one (never by a kill) are not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError, TimeoutError
from sqlalchemy.orm import Session

from leaderboard.database import WRITE, connect, migrate
from studies.errors import DatabaseUnusableError, StudyError
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
        self._unsynced_engine = connect(db) if self.sqlite else self.engine
        self._writing = self.engine.execution_options(**{WRITE: True})
        self._unsynced = self._unsynced_engine.execution_options(**{WRITE: True})
        self._queue = threading.Lock()

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads.

        Raises:
            DatabaseUnusableError: locked, damaged or gone.
        """
        with self._said_plainly(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self, *, synced: bool = True) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end, rolled back on any exception.

        Args:
            synced: whether the commit waits for the disk; otherwise a power cut (no kill) may take it back.

        Raises:
            DatabaseUnusableError: locked, full, damaged or gone; nothing was written.
        """
        with (
            self._said_plainly(),
            self._queue if self.sqlite else nullcontext(),
            Session(self._writing if synced else self._unsynced, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """What is wrong with the database as one sentence; errors of our own making stay what they are."""
        try:
            yield
        except (DatabaseError, TimeoutError) as error:
            if isinstance(error, IntegrityError | ProgrammingError | DataError):
                raise
            raise DatabaseUnusableError(
                f"Cannot use the database {self.shown}: {getattr(error, 'orig', error)}. Nothing was lost and nothing "
                "of this step was stored: free it, or make room on its disk, and run the same command again."
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._unsynced_engine.dispose()
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
