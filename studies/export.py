"""``study export``: the votes as CSV, JSON Lines and Parquet, and a copy of the database.

Before unblinding the tables hold nothing that is constant per model: no model, clip, seed, side of a model, or answer
that is right because of a model.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from studies.database import Database, find_study
from studies.design import QUESTIONS
from studies.errors import DatabaseUnusableError, NotEnoughVotesError, SealedError, StudyError
from studies.files import write_atomic
from studies.models import Audit, Rater, Sheet, Study, Trial, Vote
from studies.serving import StudyFolder
from studies.tally import load_answers, open_sealed


def export_study(
    folder: StudyFolder, db: str | None, out: Path, *, command: str, backup: bool = False
) -> dict[str, Any]:
    """Write votes.csv, votes.jsonl and votes.parquet, one row a vote and question.

    Args:
        folder: the study's folder.
        db: database URL or path.
        out: folder of the files.
        command: the command line, for the audit log.
        backup: also copy the whole SQLite database to votes.db; only once unblinded, since it holds everything.

    Returns:
        rows, blind, and the files written.

    Raises:
        NotEnoughVotesError: there are no votes.
        SealedError: a backup of a blind study was asked for.
        StudyError: a backup of PostgreSQL, or one over the database itself, was asked for.
    """
    import pandas as pd

    database = Database(db)
    copy = out / "votes.db"
    try:
        if backup:
            _may_back_up(database, copy)
        with database.writing() as session:
            study = find_study(session, folder.name, folder.schedule_hash, database.shown)
            blind = study.unblinded is None
            if backup and blind:
                raise SealedError(f"A copy of the database would unblind the study {study.name!r}; unblind it first.")
            rows = _blind(session, study) if blind else _open(session, study, folder.path)
            detail = {"command": command, "rows": len(rows), "blind": blind}
            session.add(Audit(study_id=study.id, at=datetime.now(UTC), action="exported", detail=detail))
        if not rows:
            raise NotEnoughVotesError(f"The study {folder.name!r} has no votes to export yet.")
        out.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(rows)
        files = {
            "votes.csv": table.to_csv(index=False).encode(),
            "votes.jsonl": table.to_json(orient="records", lines=True, force_ascii=False).encode(),
            "votes.parquet": table.to_parquet(index=False),
        }
        for name, data in files.items():
            write_atomic(out / name, data)
        if backup:
            _back_up(database, copy)
    finally:
        database.close()
    return {"rows": len(rows), "blind": blind, "files": [str(out / name) for name in (*files, *[copy.name] * backup)]}


def _may_back_up(database: Database, copy: Path) -> None:
    """Refuse before anything is written.

    Raises:
        StudyError: it is no SQLite database, or the copy would take its place.
    """
    if not database.sqlite:
        raise StudyError(
            f"--backup copies SQLite databases only; copy {database.shown} with pg_dump, and export without."
        )
    own = Path(database.engine.url.database or "")
    if own.resolve() == copy.resolve() or (copy.exists() and own.exists() and own.samefile(copy)):
        raise StudyError(f"The backup would take the place of the database {own} itself; choose another --out.")


def _back_up(database: Database, copy: Path) -> None:
    """Copy the database under a temporary name and rename it into place.

    Raises:
        DatabaseUnusableError: it cannot be read, or there is no space.
    """
    temporary = copy.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.rollback()
            connection.connection.driver_connection.execute("VACUUM INTO ?", (str(temporary),))  # type: ignore[union-attr]
        temporary.replace(copy)
    except sqlite3.Error as error:
        raise DatabaseUnusableError(
            f"Cannot copy the database to {copy} ({error}); make room there and run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _blind(session: Session, study: Study) -> list[dict[str, Any]]:
    rows = session.execute(
        select(Vote, Trial, Sheet.number, Rater.key_hash)
        .join(Trial, Trial.id == Vote.trial_id)
        .join(Sheet, Sheet.id == Trial.sheet_id)
        .join(Rater, Rater.id == Vote.rater_id)
        .where(Vote.study_id == study.id)
        .order_by(Vote.created, Vote.trial_id)
    ).all()
    found = []
    for vote, trial, sheet, rater in rows:
        common = {
            "study": study.name, "schedule_hash": vote.schedule_hash, "simulated": study.simulated, "rater": rater,
            "sheet": sheet, "position": trial.position, "kind": trial.kind, "prompt": trial.prompt,
            "seconds_total": vote.seconds_total, "watched_left": vote.watched_left,
            "watched_right": vote.watched_right, "replays": vote.replays, "slow": vote.slow,
            "first_question": vote.first_question, "withdrawn": vote.withdrawn, "app_version": vote.app_version,
            "created": vote.created.isoformat(),
        }  # fmt: skip
        answers = zip(
            QUESTIONS, (vote.quality, vote.alignment), (vote.seconds_quality, vote.seconds_alignment), strict=True
        )
        found += [
            {**common, "question": question, "choice": choice, "seconds": seconds}
            for question, choice, seconds in answers
        ]
    return found


def _open(session: Session, study: Study, path: Path) -> list[dict[str, Any]]:
    sealed = open_sealed(path, study)
    names: list[str] = [model["name"] for model in sealed.models]
    found: list[dict[str, Any]] = []
    for answer in load_answers(session, study, sealed):
        left, right = (names[model] for model in answer.models)
        common: Mapping[str, Any] = {
            "study": study.name, "schedule_hash": answer.schedule_hash, "simulated": study.simulated,
            "rater": answer.rater, "sheet": answer.sheet, "position": answer.position, "kind": answer.kind,
            "pair": answer.pair, "prompt": answer.prompt, "prompt_id": answer.prompt_id,
            "index_a": answer.index_a, "index_b": answer.index_b, "seed_left": answer.seeds[0],
            "seed_right": answer.seeds[1], "model_left": left, "model_right": right,
            "seconds_total": answer.seconds_total, "watched_left": answer.watched[0],
            "watched_right": answer.watched[1], "replays": answer.replays, "slow": answer.slow,
            "first_question": answer.first_question, "app_version": answer.app_version,
            "created": answer.created.isoformat(),
        }  # fmt: skip
        for number, question in enumerate(QUESTIONS):
            choice = answer.choices[number]
            preferred = {"left": left, "right": right}.get(choice) if answer.kind in ("main", "repeat") else None
            found.append(
                {
                    **common, "question": question, "choice": choice, "preferred_model": preferred,
                    "correct": None if answer.correct[number] is None else choice == answer.correct[number],
                    "seconds": answer.seconds[number],
                }
            )  # fmt: skip
    return found
