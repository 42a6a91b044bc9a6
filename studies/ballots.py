"""Who votes on what: joining, leasing a sheet in one transaction, the trial that is open, withdrawal.

A sheet belongs to the rater who leased it. A rater who stays silent past the lease keeps the sheet until a newcomer
finds no fresh one; then the newcomer takes over what is unanswered. A rater is finished, and gets the completion code,
once the own sheet is answered; one who lost it, only once no other is left to go on with.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from studies.models import Audit, Rater, Sheet, Trial, Vote


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rater stands."""

    trial: Trial | None
    """The open trial; None when there is none for this rater."""
    done: int
    """Answered trials of the sheet, practice left out."""
    total: int
    """Trials of the sheet, practice left out."""
    finished: bool
    """Whether this rater has nothing left to do, now or later."""


def find_rater(session: Session, study_id: int, key_hash: str, *, lock: bool = False) -> Rater | None:
    """The rater's row; locked against the rater's other tabs where ``lock``."""
    query = select(Rater).where(Rater.study_id == study_id, Rater.key_hash == key_hash)
    return session.scalars(query.with_for_update() if lock else query).one_or_none()


def consent(session: Session, study_id: int, key_hash: str, text_hash: str, now: datetime) -> Rater:
    """Enter a rater with the consent given; a second consent changes nothing."""
    rater = find_rater(session, study_id, key_hash, lock=True)
    if rater is None:
        rater = Rater(study_id=study_id, key_hash=key_hash, joined=now, consent_hash=text_hash, consented=now)
        session.add(rater)
        session.flush()
    return rater


def standing(session: Session, rater: Rater, now: datetime, lease: timedelta) -> Standing:
    """The rater's open trial, leasing a sheet and issuing tokens as needed; renews the lease.

    Args:
        session: a writing one, with the rater locked.
        rater: who has consented and not withdrawn.
        now: the time.
        lease: how long a silent rater keeps a sheet for sure.
    """
    if rater.finished is not None:
        return Standing(trial=None, done=0, total=0, finished=True)
    own = select(Sheet).where(Sheet.rater_id == rater.id).order_by(Sheet.finished, Sheet.id.desc()).limit(1)
    sheet = session.scalars(own.with_for_update()).one_or_none() or _lease(session, rater, now)
    if sheet is None:
        if _main_votes(session, rater) and not _open_sheets(session, rater):  # others did the rest
            rater.finished = now
        return Standing(trial=None, done=0, total=0, finished=rater.finished is not None)
    if rater.first_question is None:
        rater.first_question = sheet.first_question
    trials = session.execute(
        select(Trial.id, Trial.kind, Vote.trial_id, Vote.rater_id)
        .outerjoin(Vote, Vote.trial_id == Trial.id)
        .where(Trial.sheet_id == sheet.id, Trial.voided.is_(False))
        .order_by(Trial.position)
    ).all()
    mine = [row for row in trials if row[1] != "practice" and row[3] in (None, rater.id)]
    done = sum(row[2] is not None for row in mine)
    first = next((row[0] for row in trials if row[2] is None), None)
    if first is None:
        sheet.finished = True
        rater.finished = now
        return Standing(trial=None, done=done, total=len(mine), finished=True)
    sheet.lease_until = now + lease
    trial = session.get_one(Trial, first)
    if trial.rater_id != rater.id:
        trial.rater_id, trial.issued = rater.id, now
        trial.token, trial.token_left, trial.token_right = (secrets.token_urlsafe(18) for _ in range(3))
        trial.fetched_left = trial.fetched_right = False
    return Standing(trial=trial, done=done, total=len(mine), finished=False)


def withdraw(session: Session, rater: Rater, now: datetime) -> int:
    """Take a rater out: votes are marked and count nowhere, unanswered trials are free at once.

    Returns:
        The number of votes marked.
    """
    rater.withdrawn = now
    marked = _votes(session, rater)
    session.execute(update(Vote).where(Vote.rater_id == rater.id).values(withdrawn=True))
    session.execute(update(Sheet).where(Sheet.rater_id == rater.id, Sheet.finished.is_(False)).values(lease_until=now))
    detail = {"rater": rater.key_hash[:12], "votes": marked}
    session.add(Audit(study_id=rater.study_id, at=now, action="withdrawn", detail=detail))
    return marked


def _votes(session: Session, rater: Rater) -> int:
    return session.scalar(select(func.count()).select_from(Vote).where(Vote.rater_id == rater.id)) or 0


def _main_votes(session: Session, rater: Rater) -> list[str | None]:
    """The items that the rater has voted on."""
    query = select(Trial.item).join(Vote, Vote.trial_id == Trial.id)
    return list(session.scalars(query.where(Vote.rater_id == rater.id, Trial.kind == "main")))


def _open_sheets(session: Session, rater: Rater) -> bool:
    query = select(Sheet.id).where(Sheet.study_id == rater.study_id, Sheet.finished.is_(False))
    return session.scalars(query.limit(1)).first() is not None


def _lease(session: Session, rater: Rater, now: datetime) -> Sheet | None:
    """A fresh sheet, else the rest of an expired one, that shows this rater no item twice.

    One row is locked at a time: other raters find the rest free.
    """
    seen = _main_votes(session, rater)
    twice = select(Trial.id).where(
        Trial.sheet_id == Sheet.id, Trial.kind == "main", Trial.item.in_(seen), Trial.id.not_in(select(Vote.trial_id))
    )
    free = select(Sheet).where(Sheet.study_id == rater.study_id, Sheet.finished.is_(False))
    if seen:
        free = free.where(~twice.exists())
    fresh = free.where(Sheet.rater_id.is_(None)).order_by(Sheet.number)
    expired = free.where(Sheet.rater_id.is_not(None), Sheet.lease_until <= now).order_by(
        Sheet.lease_until, Sheet.number
    )
    for query in (fresh, expired):
        while sheet := session.scalars(query.limit(1).with_for_update(skip_locked=True)).one_or_none():
            if sheet.rater_id is None or _take_over(session, sheet, rater, now):
                sheet.rater_id = rater.id
                return sheet
    return None


def _take_over(session: Session, sheet: Sheet, rater: Rater, now: datetime) -> bool:
    """Prepare a sheet's rest for a newcomer: practice anew, repeats of what another saw skipped.

    Returns:
        False where no main trial was left: the sheet is closed then, and nobody needs to go on with it.
    """
    answered = select(Vote.trial_id)
    rest = select(Trial).where(Trial.sheet_id == sheet.id, Trial.voided.is_(False), Trial.id.not_in(answered))
    left = list(session.scalars(rest.order_by(Trial.position)))
    waiting = {trial.position for trial in left}
    going_on = any(trial.kind == "main" for trial in left)
    for trial in left:
        half = trial.repeat_of is not None and trial.repeat_of not in waiting
        trial.voided = half or trial.kind == "practice" or not going_on
    if going_on:
        practice = select(Trial).where(Trial.sheet_id == sheet.id, Trial.kind == "practice").order_by(Trial.position)
        every = session.scalars(practice).all()
        first = [trial for trial in every if trial.position >= 0]
        lowest = min((trial.position for trial in every), default=0)
        for place, trial in enumerate(first, lowest - len(first)):  # before all that was practised here so far
            copied = ("sheet_id", "kind", "prompt", "left", "right", "answers")
            session.add(Trial(position=place, **{name: getattr(trial, name) for name in copied}))
    sheet.finished = not going_on
    detail = {"sheet": sheet.number, "trials": len(left) * going_on, "rater": rater.key_hash[:12]}
    session.add(Audit(study_id=sheet.study_id, at=now, action="taken over" if going_on else "closed", detail=detail))
    session.flush()
    return going_on
