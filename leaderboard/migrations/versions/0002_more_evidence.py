"""Per-video scores, thumbnails, published figures, latency, preferences and claims; the origin of a result."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _id_and_key(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
        sa.UniqueConstraint("key", name=op.f(f"uq_{table}_key")),
    ]


def _of_result(table: str, *keys: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["result_id"], ["results.id"], name=op.f(f"fk_{table}_result_id_results"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("result_id", *keys, name=op.f(f"pk_{table}")),
    ]


def upgrade() -> None:
    op.add_column("results", sa.Column("origin", sa.Text(), nullable=True))
    op.create_table(
        "video_scores",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("prompt", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sample", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        *_of_result("video_scores", "name", "prompt", "sample"),
    )
    op.create_table(
        "thumbnails",
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("image", sa.LargeBinary(), nullable=False),
        *_of_result("thumbnails", "position"),
    )
    op.create_table(
        "reported",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("teacher", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("m", sa.Integer(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("h", sa.Integer(), nullable=True),
        sa.Column("blocks", sa.Integer(), nullable=True),
        sa.Column("effective_nfe", sa.Float(53), nullable=True),
        sa.Column("guided", sa.Boolean(), nullable=True),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        *_id_and_key("reported"),
    )
    op.create_table(
        "latencies",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("checkpoint_hash", sa.String(64), nullable=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("m", sa.Integer(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("h", sa.Integer(), nullable=True),
        sa.Column("effective_nfe", sa.Float(53), nullable=True),
        sa.Column("guidance", sa.Float(53), nullable=True),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=True),
        sa.Column("frames", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("repeats", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.JSON(), nullable=False),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("code_revision", sa.Text(), nullable=False),
        sa.Column("packages", sa.JSON(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        *_id_and_key("latencies"),
    )
    op.create_table(
        "preferences",
        sa.Column("study", sa.Text(), nullable=False),
        sa.Column("schedule_hash", sa.Text(), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.Column("a", sa.Text(), nullable=False),
        sa.Column("a_hash", sa.String(64), nullable=True),
        sa.Column("b", sa.Text(), nullable=False),
        sa.Column("b_hash", sa.String(64), nullable=True),
        sa.Column("wins_a", sa.Integer(), nullable=False),
        sa.Column("wins_b", sa.Integer(), nullable=False),
        sa.Column("ties", sa.Integer(), nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("low", sa.Float(53), nullable=True),
        sa.Column("high", sa.Float(53), nullable=True),
        sa.Column("p_value", sa.Float(53), nullable=True),
        sa.Column("n_votes", sa.Integer(), nullable=False),
        sa.Column("n_prompts", sa.Integer(), nullable=False),
        sa.Column("n_raters", sa.Integer(), nullable=False),
        sa.Column("excluded_raters", sa.Integer(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("code_revision", sa.Text(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        *_id_and_key("preferences"),
    )
    op.create_table(
        "claims",
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("claim", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("effect", sa.Float(53), nullable=True),
        sa.Column("low", sa.Float(53), nullable=True),
        sa.Column("high", sa.Float(53), nullable=True),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("seeds", sa.JSON(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("code_revision", sa.Text(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.CheckConstraint("verdict IN ('holds', 'does not hold', 'undecided')", name=op.f("ck_claims_verdict")),
        *_id_and_key("claims"),
    )


def downgrade() -> None:
    for table in ("claims", "preferences", "latencies", "reported", "thumbnails", "video_scores"):
        op.drop_table(table)
    with op.batch_alter_table("results") as results:
        results.drop_column("origin")
