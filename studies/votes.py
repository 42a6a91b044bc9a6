"""Taking a vote: what is checked, what is refused, and why a second identical answer is no error.

Browsers can lie about watching, so the server checks what it can see itself: both clips were asked for, and at least
the length of a clip has passed since the trial was shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from studies.design import QUESTIONS
from studies.models import Rater, Sheet, Trial, Vote
from studies.serving import StudyFolder

APP_VERSION = version("tmd-eval")
LONGEST = 24 * 3600.0
"""Largest time in seconds that a browser may report."""


class Refused(Exception):
    """A vote that is not taken.

    Args:
        status: HTTP status.
        reason: key of the page's text about it.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A vote as the browser sends it, checked for form."""

    answers: tuple[str, str]
    """Answers to the two questions: left, right or tie."""
    seconds: tuple[float, float]
    """From the unlocking of the answers to each choice."""
    watched: tuple[float, float]
    """Share watched of the left and the right clip."""
    replays: int
    slow: bool


def read_ballot(content: object, *, allow_ties: bool) -> Ballot:
    """Check a vote's form.

    Raises:
        Refused: 422, something is missing, of the wrong type or out of range.
    """
    choices = ("left", "right", "tie") if allow_ties else ("left", "right")
    try:
        if not isinstance(content, Mapping):
            raise TypeError
        answers = tuple(str(content["answers"][question]) for question in QUESTIONS)
        seconds = tuple(_number(content["seconds"][question], LONGEST) for question in QUESTIONS)
        watched = tuple(_number(content["watched"][side], 1.0) for side in ("left", "right"))
        replays = int(_number(content["replays"], 10_000))
        slow = content["slow"]
        if not set(answers) <= set(choices) or not isinstance(slow, bool):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a whole number may be too large for a float
        raise Refused(422, "malformed") from error
    return Ballot(
        answers=(answers[0], answers[1]),
        seconds=(seconds[0], seconds[1]),
        watched=(watched[0], watched[1]),
        replays=replays,
        slow=slow,
    )


def cast(session: Session, study: StudyFolder, rater: Rater, token: str, ballot: Ballot, now: datetime) -> Trial:
    """Store a vote.

    Args:
        session: a writing one, with the rater locked.
        study: the study's folder.
        rater: who votes.
        token: the trial's one-time token.
        ballot: the answers.
        now: the time.

    Returns:
        The trial voted on. The same answers again store nothing and return it too.

    Raises:
        Refused: 404 unknown or expired token, 403 another rater's, 409 other answers than those stored, 422 not
            watched.
    """
    trial = session.scalars(select(Trial).where(Trial.token == token)).one_or_none()
    if trial is None:
        raise Refused(404, "expired")
    if trial.rater_id != rater.id:
        raise Refused(403, "foreign")
    stored = session.get(Vote, trial.id)
    if stored is not None:
        if (stored.quality, stored.alignment) != ballot.answers:
            raise Refused(409, "conflict")
        return trial
    sheet = session.get_one(Sheet, trial.sheet_id, with_for_update=True)
    if sheet.rater_id != rater.id or trial.issued is None:
        raise Refused(404, "expired")
    passed = (now - trial.issued).total_seconds()
    least = study.min_watched
    if not (trial.fetched_left and trial.fetched_right) or min(ballot.watched) < least:
        raise Refused(422, "unwatched")
    if passed < least * study.clip_seconds:
        raise Refused(422, "unwatched")
    session.add(
        Vote(
            trial_id=trial.id, study_id=rater.study_id, rater_id=rater.id,
            quality=ballot.answers[0], alignment=ballot.answers[1],
            seconds_quality=ballot.seconds[0], seconds_alignment=ballot.seconds[1], seconds_total=passed,
            watched_left=ballot.watched[0], watched_right=ballot.watched[1], replays=ballot.replays, slow=ballot.slow,
            first_question=rater.first_question or sheet.first_question,
            schedule_hash=study.schedule_hash, app_version=APP_VERSION, created=now,
        )
    )  # fmt: skip
    session.flush()
    return trial


def _number(value: Any, largest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    if not 0 <= value <= largest:
        raise ValueError
    return float(value)
