"""Opening the database: address, connection settings, and the migration to the newest schema.

SQLite runs in WAL mode with a busy timeout, and every writing transaction starts with BEGIN IMMEDIATE: a plain BEGIN
that reads first and writes later is refused as soon as another writer committed in between, and no timeout helps it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
)
from sqlalchemy.orm import Session

from leaderboard.errors import LeaderboardError, without_password

DEFAULT_DB = "tmd-eval.db"
WRITE = "writes"  # execution option: this connection's transactions will write


def database_url(db: str | None = None) -> str:
    """The database's URL: the given one, else ``TMD_EVAL_DB``, else ./tmd-eval.db; a plain path means SQLite.

    >>> database_url("results.db")
    'sqlite:///results.db'
    """
    db = db or os.environ.get("TMD_EVAL_DB") or DEFAULT_DB
    if "://" not in db:
        return f"sqlite:///{db}"
    return db.replace("postgresql://", "postgresql+psycopg://", 1)


def _sqlite_settings(connection: Any, _record: object) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    connection.isolation_level = None  # the driver's own BEGIN comes too late; see _begin
    for setting in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITE) else "BEGIN")


def connect(db: str | None = None) -> Engine:
    """An engine with this project's connection settings, whatever schema the database has.

    Args:
        db: URL or path as ``database_url`` takes it.

    Raises:
        LeaderboardError: the address is wrong, or its driver is missing.
    """
    address = database_url(db)
    try:
        url = make_url(address)
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise LeaderboardError(
                f"{without_password(address)!r} is neither an SQLite nor a PostgreSQL address; write a file's path."
            )
        engine = create_engine(url)
    except LeaderboardError:
        raise
    except (ArgumentError, NoSuchModuleError, ValueError) as error:  # ValueError: a port that is no number
        shown = without_password(address)
        told = without_password(str(error))
        raise LeaderboardError(f"{shown!r} is not a database address ({told}); write a file's path.") from error
    except ModuleNotFoundError as error:
        raise LeaderboardError(
            f"The driver {error.name} of {url.render_as_string()} is missing: pip install 'psycopg[binary]'."
        ) from error
    event.listen(engine, "connect", _sqlite_settings)
    event.listen(engine, "begin", _begin)
    return engine


def migrate(engine: Engine, folder: Path, *, version_table: str = "alembic_version") -> None:
    """Bring one room's tables to their newest schema; on failure the engine is disposed of.

    Args:
        engine: from :func:`connect`.
        folder: the room's Alembic migrations; their env.py takes ``connection`` and ``version_table`` from the
            attributes of the configuration.
        version_table: where the room keeps its schema's version, so that rooms share a database.

    Raises:
        LeaderboardError: the file is no database or cannot be opened, or it is newer than the code.
    """
    shown = engine.url.render_as_string(hide_password=True)
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["version_table"] = version_table
    try:
        _upgrade(engine, shown, config)
    except DatabaseError as error:
        engine.dispose()
        raise LeaderboardError(
            f"Cannot open the database {shown}: {error.orig}. Name another with --db or TMD_EVAL_DB."
        ) from error
    except LeaderboardError:
        engine.dispose()
        raise


def _upgrade(engine: Engine, shown: str, config: Config) -> None:
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    options = {"version_table": config.attributes["version_table"]}
    with engine.connect() as connection:
        current = MigrationContext.configure(connection, opts=options).get_current_revision()
    if current == head:
        return
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise LeaderboardError(
            f"The database {shown} has schema {current}, which this version of tmd-eval does not know (its newest is "
            f"{head}): upgrade tmd-eval, or name another database with --db."
        )
    with engine.execution_options(**{WRITE: True}).begin() as connection:  # one process migrates, others wait
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(7306144)"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def open_engine(db: str | None = None) -> Engine:
    """Connect and bring the leaderboard's schema to the newest version.

    Args:
        db: URL or path as ``database_url`` takes it.

    Raises:
        LeaderboardError: the address is wrong, the file is no database or cannot be opened, or it is newer than
            the code.
    """
    engine = connect(db)
    migrate(engine, Path(__file__).with_name("migrations"))
    return engine


@contextmanager
def _said_plainly(engine: Engine) -> Iterator[None]:
    """A damaged, locked or full database as one sentence; errors of our own making stay what they are."""
    try:
        yield
    except DatabaseError as error:
        if isinstance(error, IntegrityError | ProgrammingError | DataError):
            raise
        shown = engine.url.render_as_string(hide_password=True)
        raise LeaderboardError(
            f"Cannot use the database {shown}: {error.orig}. Nothing was changed; if it is damaged, restore a copy, or "
            "name another with --db."
        ) from error


@contextmanager
def reading(db: str | None = None) -> Iterator[Session]:
    """A session that only reads; its objects stay usable after it is closed."""
    engine = open_engine(db)
    try:
        with _said_plainly(engine), Session(engine, expire_on_commit=False) as session:
            yield session
    finally:
        engine.dispose()


@contextmanager
def writing(db: str | None = None) -> Iterator[Session]:
    """A session in one writing transaction: committed at the end, rolled back on any exception."""
    engine = open_engine(db)
    try:
        writer = engine.execution_options(**{WRITE: True})
        with _said_plainly(engine), Session(writer, expire_on_commit=False) as session, session.begin():
            yield session
    finally:
        engine.dispose()
