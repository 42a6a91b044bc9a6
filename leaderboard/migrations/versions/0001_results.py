"""Results and their metrics: the first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "results",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("method", sa.String(64), nullable=False),
        sa.Column("m", sa.Integer(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("h", sa.Integer(), nullable=True),
        sa.Column("blocks", sa.Integer(), nullable=True),
        sa.Column("effective_nfe", sa.Float(53), nullable=True),
        sa.Column("forward_passes", sa.Float(53), nullable=True),
        sa.Column("guidance", sa.Float(53), nullable=True),
        sa.Column("sampler", sa.Text(), nullable=True),
        sa.Column("base", sa.Text(), nullable=True),
        sa.Column("checkpoint", sa.Text(), nullable=True),
        sa.Column("checkpoint_hash", sa.String(64), nullable=True),
        sa.Column("prompts_name", sa.Text(), nullable=False),
        sa.Column("prompts_sha256", sa.String(64), nullable=False),
        sa.Column("prompts_count", sa.Integer(), nullable=False),
        sa.Column("samples_per_prompt", sa.Integer(), nullable=False),
        sa.Column("seeds", sa.JSON(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("frames", sa.Integer(), nullable=True),
        sa.Column("fps", sa.Float(53), nullable=True),
        sa.Column("dtype", sa.String(16), nullable=True),
        sa.Column("videos", sa.Integer(), nullable=False),
        sa.Column("seconds_per_video", sa.Float(53), nullable=True),
        sa.Column("batch_size", sa.Integer(), nullable=True),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("code_revision", sa.Text(), nullable=False),
        sa.Column("packages", sa.JSON(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.CheckConstraint("role IN ('teacher', 'undistilled', 'student')", name=op.f("ck_results_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_results")),
        sa.UniqueConstraint("key", name=op.f("uq_results_key")),
    )
    op.create_table(
        "metrics",
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("low", sa.Float(53), nullable=True),
        sa.Column("high", sa.Float(53), nullable=True),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("completeness", sa.Float(53), nullable=False),
        sa.Column("metric_version", sa.Text(), nullable=False),
        sa.Column("weight_hashes", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["result_id"], ["results.id"], name=op.f("fk_metrics_result_id_results"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("result_id", "name", name=op.f("pk_metrics")),
    )


def downgrade() -> None:
    op.drop_table("metrics")
    op.drop_table("results")
