"""Database models: one row a measured result, one child row a metric of it.

The schema is portable (SQLite and PostgreSQL); a change here needs a migration in ``leaderboard/migrations/versions``,
and a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, DateTime, Dialect, Float, ForeignKey, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

ROLES = ("teacher", "undistilled", "student")
"""teacher: the base model at its full number of steps; undistilled: the same at few steps; student: distilled."""


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone, UTC in the database (SQLite has no zones, so they are put back on reading)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Common base; named constraints, so that migrations can refer to them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Result(Base):
    """One measured result: a model, sampled in one way, on one prompt set, by one code revision on one device."""

    __tablename__ = "results"
    __table_args__ = (CheckConstraint("role IN ('teacher', 'undistilled', 'student')", name="role"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    """Number of the row in this database; nothing outside it may rely on it."""
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of what identifies the measurement (``record.IDENTITY``); the same run finds its row by it."""
    source: Mapped[str] = mapped_column(String(16))
    """Where the numbers come from; "measured": scored here, from videos generated here."""
    name: Mapped[str] = mapped_column(Text)
    """Name people see, such as "TMD-N2H2"."""
    role: Mapped[str] = mapped_column(String(16))
    """One of ``ROLES``."""
    method: Mapped[str] = mapped_column(String(64))
    """Method of distillation, such as "tmd"; "teacher" where there is none."""
    m: Mapped[int | None]
    """M, outer (transition) steps."""
    n: Mapped[int | None]
    """N, inner steps of the flow head per outer step; None for models without a flow head."""
    h: Mapped[int | None]
    """H, transformer blocks of the flow head; None for models without one."""
    blocks: Mapped[int | None]
    """L, transformer blocks of the whole model."""
    effective_nfe: Mapped[float | None] = mapped_column(Float(53))
    """Executed blocks / L, per guidance branch (Eq. 16)."""
    forward_passes: Mapped[float | None] = mapped_column(Float(53))
    """Effective NFE times the guidance branches: twice ``effective_nfe`` under classifier-free guidance."""
    guidance: Mapped[float | None] = mapped_column(Float(53))
    """Scale of classifier-free guidance at sampling; None or 1 where there is no second branch."""
    sampler: Mapped[str | None] = mapped_column(Text)
    """Name of the sampler, with its time grid or shift."""
    base: Mapped[str | None] = mapped_column(Text)
    """The base model: its reference (hub id, path or "micro"), revision and hash."""
    checkpoint: Mapped[str | None] = mapped_column(Text)
    """Reference of the checkpoint as the user gave it: a folder, a hub id or "micro"."""
    checkpoint_hash: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the checkpoint's weights and settings."""
    prompts_name: Mapped[str] = mapped_column(Text)
    """Name of the prompt set; rows of one name are compared with each other."""
    prompts_sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the prompts really used (a limited set has its own)."""
    prompts_count: Mapped[int]
    """Number of prompts."""
    samples_per_prompt: Mapped[int]
    """Videos asked for each prompt."""
    seeds: Mapped[list[int]] = mapped_column(JSON)
    """Base seeds of the generation; each video's own seed stands in the run's manifest."""
    height: Mapped[int | None]
    """Pixels."""
    width: Mapped[int | None]
    """Pixels."""
    frames: Mapped[int | None]
    """Frames a video."""
    fps: Mapped[float | None] = mapped_column(Float(53))
    """Frames a second."""
    dtype: Mapped[str | None] = mapped_column(String(16))
    """Precision of the transformer while sampling, such as "float32"."""
    videos: Mapped[int]
    """Videos the manifest really lists."""
    seconds_per_video: Mapped[float | None] = mapped_column(Float(53))
    """Median over the videos of the wall-clock seconds to sample and decode one: a batch's time over its size."""
    batch_size: Mapped[int | None]
    """Videos sampled at once; seconds per video depend on it."""
    device: Mapped[str] = mapped_column(Text)
    """Processor or GPU the videos were sampled on, in words."""
    code_revision: Mapped[str] = mapped_column(Text)
    """Git commit of the code, with "+changes" where files differed from it; outside a checkout the version."""
    packages: Mapped[dict[str, str]] = mapped_column(JSON)
    """Versions of the packages that matter, by name."""
    command: Mapped[str] = mapped_column(Text)
    """Command line that made the run."""
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the run was started (UTC)."""
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the run's manifest.jsonl: which videos were scored."""
    run: Mapped[str] = mapped_column(Text)
    """Run folder at the time of recording; the report takes clips from it. Never printed in a report."""
    metrics: Mapped[list[Metric]] = relationship(
        back_populates="result", cascade="all, delete-orphan", order_by="Metric.name", lazy="selectin"
    )

    @property
    def expected_videos(self) -> int:
        return self.prompts_count * self.samples_per_prompt

    @property
    def flags(self) -> list[str]:
        """What a reader must know before comparing: "incomplete", "unscored", "modified code"."""
        flags = []
        if self.videos < self.expected_videos or any(metric.completeness < 1 for metric in self.metrics):
            flags.append("incomplete")
        if not self.metrics:
            flags.append("unscored")
        if self.code_revision.endswith("+changes"):
            flags.append("modified code")
        return flags

    @property
    def ranked(self) -> bool:
        """Whether the row may be ranked: complete and scored."""
        return not {"incomplete", "unscored"} & set(self.flags)

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values, metrics by name, with its flags."""
        columns = [column.key for column in Result.__table__.columns if column.key != "key"]
        row = {name: getattr(self, name) for name in columns}
        row["created"] = self.created.isoformat()
        row["flags"] = self.flags
        row["metrics"] = {metric.name: metric.to_dict() for metric in self.metrics}
        return row


class Metric(Base):
    """One score of a result, on the scale of its files (0 to 1 for shares; distances as they are)."""

    __tablename__ = "metrics"

    result_id: Mapped[int] = mapped_column(ForeignKey("results.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    """Dimension, as its score file is called."""
    value: Mapped[float] = mapped_column(Float(53))
    """Point estimate over all scored videos."""
    low: Mapped[float | None] = mapped_column(Float(53))
    """Lower end of the 95 % interval (bootstrap over prompts); None where the scorer gives none."""
    high: Mapped[float | None] = mapped_column(Float(53))
    """Upper end of the 95 % interval."""
    n: Mapped[int]
    """Videos scored."""
    completeness: Mapped[float] = mapped_column(Float(53))
    """Scored videos over expected ones, 0 to 1; below 1 the row is never ranked."""
    metric_version: Mapped[str] = mapped_column(Text)
    """Version of the scoring code."""
    weight_hashes: Mapped[dict[str, str]] = mapped_column(JSON)
    """SHA-256 of every weight file the scorer used, by name; empty for weights-free judges."""
    result: Mapped[Result] = relationship(back_populates="metrics")

    def to_dict(self) -> dict[str, Any]:
        columns = [column.key for column in Metric.__table__.columns if column.key not in ("result_id", "name")]
        return {name: getattr(self, name) for name in columns}
