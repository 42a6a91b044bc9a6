"""Database models: measured results with their metrics and per-video scores, and what stands beside them: published
figures, latency, preferences and claims.

The schema is portable (SQLite and PostgreSQL); a change here needs a migration in ``leaderboard/migrations/versions``,
and a test compares the two. Published figures have a table of their own, so that no query mixes them with ours.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    LargeBinary,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from leaderboard.checks import DIMENSIONS

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
    """Name of the prompt set, and of the texts that models read instead; rows of one set are compared."""
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
    origin: Mapped[str | None] = mapped_column(Text)
    """Bundle the row came in (its lab and hash); None where it was recorded here."""
    metrics: Mapped[list[Metric]] = relationship(
        back_populates="result", cascade="all, delete-orphan", order_by="Metric.name", lazy="selectin"
    )

    @property
    def expected_videos(self) -> int:
        return self.prompts_count * self.samples_per_prompt

    @property
    def completeness(self) -> float:
        """Share of what a full row has: videos and scores, and of VBench's dimensions all sixteen."""
        share = min([1.0, self.videos / max(self.expected_videos, 1), *(m.completeness for m in self.metrics)])
        scored = sum(metric.name in DIMENSIONS for metric in self.metrics)
        return share * scored / len(DIMENSIONS) if scored else share if self.metrics else 0.0

    @property
    def flags(self) -> list[str]:
        """What a reader must know before comparing: "incomplete", "unscored", "modified code", "imported"."""
        flags = []
        if self.videos < self.expected_videos or any(metric.completeness < 1 for metric in self.metrics):
            flags.append("incomplete")
        if not self.metrics:
            flags.append("unscored")
        if self.code_revision.endswith("+changes"):
            flags.append("modified code")
        if self.origin is not None:
            flags.append("imported")
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
        row["completeness"] = self.completeness
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


class VideoScore(Base):
    """One video's score in one metric, for comparisons prompt by prompt; the metric itself stands in ``metrics``."""

    __tablename__ = "video_scores"

    result_id: Mapped[int] = mapped_column(ForeignKey("results.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    """Metric, as in ``metrics``."""
    prompt: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """The prompt: first 63 bits of the SHA-256 of its text, so that sets of prompts can be matched."""
    sample: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Index of the video among those of its prompt."""
    value: Mapped[float] = mapped_column(Float(53))
    """On the scale of the metric."""


class Thumbnail(Base):
    """A small picture of one clip of a row that came in a bundle, for its clips lie elsewhere."""

    __tablename__ = "thumbnails"

    result_id: Mapped[int] = mapped_column(ForeignKey("results.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Order among the row's thumbnails."""
    prompt: Mapped[str] = mapped_column(Text)
    """Text of the prompt."""
    image: Mapped[bytes] = mapped_column(LargeBinary)
    """PNG or WebP: frames of the clip side by side, first to last."""


class Reported(Base):
    """One row as a paper or a README prints it; nothing of it was measured here."""

    __tablename__ = "reported"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the row as it was given; importing it again finds it."""
    source: Mapped[str] = mapped_column(Text)
    """Where it is printed, such as "arXiv:2601.09881 Table 1"."""
    teacher: Mapped[str] = mapped_column(Text)
    """Base model, such as "Wan2.1 1.3B"."""
    method: Mapped[str] = mapped_column(Text)
    """Method as printed, such as "TMD-N2H5"; "teacher" for the base model itself."""
    m: Mapped[int | None]
    """M, outer steps."""
    n: Mapped[int | None]
    """N, inner steps."""
    h: Mapped[int | None]
    """H, blocks of the flow head."""
    blocks: Mapped[int | None]
    """L, blocks of the base model, where it is known (``published.BLOCKS``)."""
    effective_nfe: Mapped[float | None] = mapped_column(Float(53))
    """As printed, without the factor of classifier-free guidance."""
    guided: Mapped[bool | None]
    """Whether classifier-free guidance runs the model twice a step; None where the source does not say."""
    scores: Mapped[dict[str, float]] = mapped_column(JSON)
    """Percent as printed, by name: "total", "quality", "semantic", and VBench's dimensions where they are printed."""
    note: Mapped[str] = mapped_column(Text)
    """What the source adds."""
    origin: Mapped[str | None] = mapped_column(Text)
    """As in ``results``."""


class Latency(Base):
    """One timing of one model at one batch size: a row of a latency.json."""

    __tablename__ = "latencies"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of what identifies the timing; recording it again finds it."""
    name: Mapped[str] = mapped_column(Text)
    checkpoint_hash: Mapped[str | None] = mapped_column(String(64))
    """As in ``results``; ties the timing to the results of the same weights."""
    role: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(String(64))
    m: Mapped[int | None]
    n: Mapped[int | None]
    h: Mapped[int | None]
    effective_nfe: Mapped[float | None] = mapped_column(Float(53))
    guidance: Mapped[float | None] = mapped_column(Float(53))
    batch: Mapped[int]
    """Videos sampled at once."""
    dtype: Mapped[str | None] = mapped_column(String(16))
    frames: Mapped[int | None]
    height: Mapped[int | None]
    width: Mapped[int | None]
    repeats: Mapped[int]
    """Timed repeats after the warm-up."""
    seconds: Mapped[dict[str, dict[str, float]]] = mapped_column(JSON)
    """Seconds of a whole batch by part ("text", "backbone", "head", "vae", "write", "total"): median and p95."""
    peak_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Highest memory during the timing."""
    device: Mapped[str] = mapped_column(Text)
    code_revision: Mapped[str] = mapped_column(Text)
    packages: Mapped[dict[str, str]] = mapped_column(JSON)
    command: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    origin: Mapped[str | None] = mapped_column(Text)
    """As in ``results``."""


class Preference(Base):
    """The outcome of one question about one pair of models in one preference study."""

    __tablename__ = "preferences"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of study, schedule, question and pair; a new analysis of the same study replaces the row."""
    study: Mapped[str] = mapped_column(Text)
    schedule_hash: Mapped[str] = mapped_column(Text)
    """Hash of the design, fixed before the first vote."""
    question: Mapped[str] = mapped_column(Text)
    """"visual quality" or "prompt alignment"."""
    a: Mapped[str] = mapped_column(Text)
    a_hash: Mapped[str | None] = mapped_column(String(64))
    """Checkpoint hash of a."""
    b: Mapped[str] = mapped_column(Text)
    b_hash: Mapped[str | None] = mapped_column(String(64))
    wins_a: Mapped[int]
    wins_b: Mapped[int]
    ties: Mapped[int]
    value: Mapped[float] = mapped_column(Float(53))
    """Preference for a, 0 to 1."""
    low: Mapped[float | None] = mapped_column(Float(53))
    high: Mapped[float | None] = mapped_column(Float(53))
    p_value: Mapped[float | None] = mapped_column(Float(53))
    n_votes: Mapped[int]
    n_prompts: Mapped[int]
    n_raters: Mapped[int]
    excluded_raters: Mapped[int]
    """Raters of the study left out by its exclusion rules."""
    method: Mapped[str] = mapped_column(Text)
    """How value and interval were computed."""
    simulated: Mapped[bool]
    """Votes of a stated model instead of people; said wherever the row is shown."""
    code_revision: Mapped[str] = mapped_column(Text)
    command: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    origin: Mapped[str | None] = mapped_column(Text)
    """As in ``results``."""


class Claim(Base):
    """What one experiment report found about one claim of a paper."""

    __tablename__ = "claims"
    __table_args__ = (CheckConstraint("verdict IN ('holds', 'does not hold', 'undecided')", name="verdict"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of report, claim and source; a new report of the same name replaces the row."""
    report: Mapped[str] = mapped_column(Text)
    """Name of the report folder."""
    claim: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(Text)
    """Where the claim is made."""
    verdict: Mapped[str] = mapped_column(String(16))
    effect: Mapped[float | None] = mapped_column(Float(53))
    low: Mapped[float | None] = mapped_column(Float(53))
    high: Mapped[float | None] = mapped_column(Float(53))
    n: Mapped[int | None]
    seeds: Mapped[Any] = mapped_column(JSON)
    """Training seeds, as the report states them."""
    device: Mapped[str] = mapped_column(Text)
    code_revision: Mapped[str] = mapped_column(Text)
    command: Mapped[str] = mapped_column(Text)
    origin: Mapped[str | None] = mapped_column(Text)
    """As in ``results``."""
