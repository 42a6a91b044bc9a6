"""Database models of the studies: while a study is blind, no row names a model or says which one made a clip.

That stands only in the study folder's sealed schedule, seeds included; rows point to it by sheet and position. Of three
or more models the pairs' shared file names still show which clips are of one and the same model, not of which. A change
here needs a migration in ``studies/migrations/versions``, and a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from leaderboard.models import UtcDateTime

VERSION_TABLE = "study_alembic_version"
"""Where Alembic keeps the version of these tables, beside the leaderboard's own."""


class Base(DeclarativeBase):
    """Common base; named constraints, so that migrations can refer to them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Study(Base):
    """One study."""

    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    schedule_hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of design, exclusion rules, trials and clips; the study folder must have the same."""
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    simulated: Mapped[bool] = mapped_column(default=False)
    """Whether simulated raters have voted; never taken back."""
    unblinded: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When win rates were first asked for; None while the operator is blind."""


class Rater(Base):
    """One person in one study, known by a keyed hash only."""

    __tablename__ = "study_raters"
    __table_args__ = (UniqueConstraint("study_id", "key_hash"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    key_hash: Mapped[str] = mapped_column(String(64))
    """HMAC-SHA256 of the rater's id under the study's secret."""
    joined: Mapped[datetime] = mapped_column(UtcDateTime)
    consent_hash: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the consent text agreed to."""
    consented: Mapped[datetime | None] = mapped_column(UtcDateTime)
    first_question: Mapped[str | None] = mapped_column(String(32))
    """The question this rater sees first."""
    finished: Mapped[datetime | None] = mapped_column(UtcDateTime)
    withdrawn: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Set on withdrawal: the votes stay for the audit and count nowhere."""


class Sheet(Base):
    """A rater's sheet of trials, and who holds it until when."""

    __tablename__ = "study_sheets"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    number: Mapped[int]
    """Place of the sheet in the schedule, from 0."""
    first_question: Mapped[str] = mapped_column(String(32))
    rater_id: Mapped[int | None] = mapped_column(ForeignKey("study_raters.id"), index=True)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """A holder silent until then may lose the rest of the sheet; None for a sheet nobody has had."""
    finished: Mapped[bool] = mapped_column(default=False)


class Trial(Base):
    """One trial of a sheet, with its one-time tokens once it is shown."""

    __tablename__ = "study_trials"
    __table_args__ = (UniqueConstraint("sheet_id", "position"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    sheet_id: Mapped[int] = mapped_column(ForeignKey("study_sheets.id"))
    position: Mapped[int]
    """Place in the sheet, from 0, practice included."""
    kind: Mapped[str] = mapped_column(String(16))
    """practice, main, obvious, repeat or identical."""
    prompt: Mapped[str] = mapped_column(Text)
    item: Mapped[str | None] = mapped_column(String(32))
    """Pair and prompt by number, for main trials: no rater sees one twice."""
    left: Mapped[str] = mapped_column(String(64))
    """File of the left clip, a random name."""
    right: Mapped[str] = mapped_column(String(64))
    seed_left: Mapped[int | None] = mapped_column(BigInteger)
    """Empty, like all columns of seeds here: a set without seeds beside one with them would tell the two apart."""
    seed_right: Mapped[int | None] = mapped_column(BigInteger)
    answers: Mapped[list[str | None]] = mapped_column(JSON)
    """Right answers to the two questions, where there are any."""
    repeat_of: Mapped[int | None]
    """Position of the trial that this one repeats."""
    voided: Mapped[bool] = mapped_column(default=False)
    """Skipped: a repeat whose first showing another rater had, practice that a newcomer began anew, or the catch trials
    of a sheet that has no main trial left."""
    rater_id: Mapped[int | None] = mapped_column(ForeignKey("study_raters.id"))
    """Whom the tokens are for."""
    token: Mapped[str | None] = mapped_column(String(32), unique=True)
    token_left: Mapped[str | None] = mapped_column(String(32), unique=True)
    token_right: Mapped[str | None] = mapped_column(String(32), unique=True)
    issued: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When it was first shown to this rater."""
    fetched_left: Mapped[bool] = mapped_column(default=False)
    """Whether the left clip was asked for."""
    fetched_right: Mapped[bool] = mapped_column(default=False)


class Vote(Base):
    """A rater's two answers to a trial; at most one row a trial, never changed but for withdrawal."""

    __tablename__ = "study_votes"

    trial_id: Mapped[int] = mapped_column(ForeignKey("study_trials.id"), primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"), index=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("study_raters.id"), index=True)
    quality: Mapped[str] = mapped_column(String(8))
    """Answer on visual quality: left, right or tie."""
    alignment: Mapped[str] = mapped_column(String(8))
    """Answer on prompt alignment."""
    seconds_quality: Mapped[float] = mapped_column(Float(53))
    """From the unlocking of the answers to the last choice, by the browser's clock."""
    seconds_alignment: Mapped[float] = mapped_column(Float(53))
    seconds_total: Mapped[float] = mapped_column(Float(53))
    """From the showing of the trial to the vote, by the server's clock."""
    watched_left: Mapped[float] = mapped_column(Float(53))
    """Share of the clip watched, 0 to 1, as the browser saw it."""
    watched_right: Mapped[float] = mapped_column(Float(53))
    replays: Mapped[int]
    """Times the rater restarted the clips."""
    slow: Mapped[bool]
    """Whether half speed was used."""
    seed_left: Mapped[int | None] = mapped_column(BigInteger)
    seed_right: Mapped[int | None] = mapped_column(BigInteger)
    first_question: Mapped[str] = mapped_column(String(32))
    schedule_hash: Mapped[str] = mapped_column(String(64))
    app_version: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    withdrawn: Mapped[bool] = mapped_column(default=False)


class Audit(Base):
    """What an operator or the server did that a reader of the study must know."""

    __tablename__ = "study_audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    action: Mapped[str] = mapped_column(String(32))
    """created, served, simulated, unblinded, analyzed, exported, withdrawn, taken over, closed."""
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)
