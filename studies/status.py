"""``study status``: counts and quality, nothing that tells who is winning."""

from __future__ import annotations

import statistics
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from studies.models import Audit, Rater, Sheet, Study, Trial, Vote


def study_status(session: Session, study_id: int, now: datetime) -> dict[str, Any]:
    """How far a study is and how well raters work; a blind operator may see all of it.

    Args:
        session: a reading one.
        study_id: the study's row.
        now: the time.
    """
    study = session.get_one(Study, study_id)
    raters = session.scalars(select(Rater).where(Rater.study_id == study_id)).all()
    sheets = session.scalars(select(Sheet).where(Sheet.study_id == study_id)).all()
    rows = session.execute(
        select(Vote, Trial.kind, Trial.answers, Trial.voided)
        .join(Trial, Trial.id == Vote.trial_id)
        .where(Vote.study_id == study_id, Vote.withdrawn.is_(False))
    ).all()
    wanted = session.scalar(
        select(func.count())
        .select_from(Trial)
        .join(Sheet, Sheet.id == Trial.sheet_id)
        .where(Sheet.study_id == study_id, Trial.kind == "main")
    )
    mains = [vote for vote, kind, _, _ in rows if kind == "main"]
    obvious = [(vote.quality, vote.alignment) == tuple(answers) for vote, kind, answers, _ in rows if kind == "obvious"]
    lefts = [answer == "left" for vote in mains for answer in (vote.quality, vote.alignment)]
    return {
        "study": study.name,
        "schedule_hash": study.schedule_hash,
        "simulated": study.simulated,
        "unblinded": study.unblinded.isoformat(timespec="seconds") if study.unblinded else None,
        "raters": {
            "consented": len(raters),
            "finished": sum(rater.finished is not None and rater.withdrawn is None for rater in raters),
            "withdrawn": sum(rater.withdrawn is not None for rater in raters),
        },
        "sheets": {
            "all": len(sheets),
            "finished": sum(sheet.finished for sheet in sheets),
            "open": sum(_open(sheet, now) for sheet in sheets),
            "expired": sum(
                sheet.rater_id is not None and not sheet.finished and not _open(sheet, now) for sheet in sheets
            ),
            "fresh": sum(sheet.rater_id is None for sheet in sheets),
        },
        "votes": {"main": len(mains), "wanted": wanted or 0, "all": len(rows)},
        "quality": {
            "obvious_trials": len(obvious),
            "obvious_passed": _share(obvious),
            "left_share": _share(lefts),
            "ties": _share([answer == "tie" for vote in mains for answer in (vote.quality, vote.alignment)]),
            "median_seconds": round(statistics.median(vote.seconds_total for vote in mains), 2) if mains else None,
            "replays_per_trial": round(statistics.fmean(vote.replays for vote in mains), 3) if mains else None,
        },
        "audit": [
            {"at": row.at.isoformat(timespec="seconds"), "action": row.action}
            for row in session.scalars(select(Audit).where(Audit.study_id == study_id).order_by(Audit.id))
        ][-10:],
    }


def _open(sheet: Sheet, now: datetime) -> bool:
    return (
        sheet.rater_id is not None and not sheet.finished and sheet.lease_until is not None and sheet.lease_until > now
    )


def _share(values: list[bool]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None
