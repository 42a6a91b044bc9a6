"""``study unblind``: the one door to win rates, with a line in the audit log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from studies.database import Database, find_study
from studies.errors import StudyError
from studies.models import Audit, Vote
from studies.serving import StudyFolder
from studies.status import study_status


def unblind_study(folder: StudyFolder, db: str | None, *, reason: str, command: str) -> dict[str, Any]:
    """Unblind a study for good; doing it again adds a line and changes nothing.

    Args:
        folder: the study's folder.
        db: database URL or path.
        reason: why now; goes into the audit log with the number of votes so far.
        command: the command line.

    Returns:
        study, unblinded (UTC), votes and wanted votes at that moment.

    Raises:
        StudyError: no reason was given, or the database does not hold the study.
    """
    if not reason.strip():
        raise StudyError("Say why with --reason '...'; it goes into the audit log.")
    database = Database(db)
    try:
        with database.writing() as session:
            study = find_study(session, folder.name, folder.schedule_hash, database.shown)
            # Not before the latest vote: a server's clock may go ahead, and "cast after unblinding" compares with this.
            latest = session.scalar(select(func.max(Vote.created)).where(Vote.study_id == study.id))
            now = max(filter(None, (datetime.now(UTC), latest)))
            votes = study_status(session, study.id, now)["votes"]
            study.unblinded = study.unblinded or now
            detail = {"reason": reason.strip(), "command": command, **votes}
            session.add(Audit(study_id=study.id, at=now, action="unblinded", detail=detail))
            when = study.unblinded.isoformat(timespec="seconds")
    finally:
        database.close()
    return {"study": folder.name, "unblinded": when, "votes": votes["main"], "wanted": votes["wanted"]}
