"""Studies, raters, sheets, trials, votes and the audit log: the first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("schedule_hash", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("unblinded", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sa.UniqueConstraint("name", name=op.f("uq_studies_name")),
    )
    op.create_table(
        "study_audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_study_audit_study_id_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_audit")),
    )
    op.create_table(
        "study_raters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("key_hash", sa.String(64), nullable=False),
        sa.Column("joined", sa.DateTime(timezone=True), nullable=False),
        sa.Column("consent_hash", sa.String(64), nullable=True),
        sa.Column("consented", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_question", sa.String(32), nullable=True),
        sa.Column("finished", sa.DateTime(timezone=True), nullable=True),
        sa.Column("withdrawn", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_study_raters_study_id_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_raters")),
        sa.UniqueConstraint("study_id", "key_hash", name=op.f("uq_study_raters_study_id")),
    )
    op.create_table(
        "study_sheets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("first_question", sa.String(32), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["study_raters.id"], name=op.f("fk_study_sheets_rater_id_study_raters")),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_study_sheets_study_id_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_sheets")),
        sa.UniqueConstraint("study_id", "number", name=op.f("uq_study_sheets_study_id")),
    )
    op.create_index(op.f("ix_study_sheets_rater_id"), "study_sheets", ["rater_id"], unique=False)
    op.create_table(
        "study_trials",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sheet_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("item", sa.String(32), nullable=True),
        sa.Column("left", sa.String(64), nullable=False),
        sa.Column("right", sa.String(64), nullable=False),
        sa.Column("seed_left", sa.BigInteger(), nullable=True),
        sa.Column("seed_right", sa.BigInteger(), nullable=True),
        sa.Column("answers", sa.JSON(), nullable=False),
        sa.Column("repeat_of", sa.Integer(), nullable=True),
        sa.Column("voided", sa.Boolean(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=True),
        sa.Column("token", sa.String(32), nullable=True),
        sa.Column("token_left", sa.String(32), nullable=True),
        sa.Column("token_right", sa.String(32), nullable=True),
        sa.Column("issued", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fetched_left", sa.Boolean(), nullable=False),
        sa.Column("fetched_right", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["study_raters.id"], name=op.f("fk_study_trials_rater_id_study_raters")),
        sa.ForeignKeyConstraint(["sheet_id"], ["study_sheets.id"], name=op.f("fk_study_trials_sheet_id_study_sheets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study_trials")),
        sa.UniqueConstraint("sheet_id", "position", name=op.f("uq_study_trials_sheet_id")),
        sa.UniqueConstraint("token", name=op.f("uq_study_trials_token")),
        sa.UniqueConstraint("token_left", name=op.f("uq_study_trials_token_left")),
        sa.UniqueConstraint("token_right", name=op.f("uq_study_trials_token_right")),
    )
    op.create_table(
        "study_votes",
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("rater_id", sa.Integer(), nullable=False),
        sa.Column("quality", sa.String(8), nullable=False),
        sa.Column("alignment", sa.String(8), nullable=False),
        sa.Column("seconds_quality", sa.Float(53), nullable=False),
        sa.Column("seconds_alignment", sa.Float(53), nullable=False),
        sa.Column("seconds_total", sa.Float(53), nullable=False),
        sa.Column("watched_left", sa.Float(53), nullable=False),
        sa.Column("watched_right", sa.Float(53), nullable=False),
        sa.Column("replays", sa.Integer(), nullable=False),
        sa.Column("slow", sa.Boolean(), nullable=False),
        sa.Column("seed_left", sa.BigInteger(), nullable=True),
        sa.Column("seed_right", sa.BigInteger(), nullable=True),
        sa.Column("first_question", sa.String(32), nullable=False),
        sa.Column("schedule_hash", sa.String(64), nullable=False),
        sa.Column("app_version", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["study_raters.id"], name=op.f("fk_study_votes_rater_id_study_raters")),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_study_votes_study_id_studies")),
        sa.ForeignKeyConstraint(["trial_id"], ["study_trials.id"], name=op.f("fk_study_votes_trial_id_study_trials")),
        sa.PrimaryKeyConstraint("trial_id", name=op.f("pk_study_votes")),
    )
    op.create_index(op.f("ix_study_votes_rater_id"), "study_votes", ["rater_id"], unique=False)
    op.create_index(op.f("ix_study_votes_study_id"), "study_votes", ["study_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_study_votes_study_id"), table_name="study_votes")
    op.drop_index(op.f("ix_study_votes_rater_id"), table_name="study_votes")
    op.drop_table("study_votes")
    op.drop_table("study_trials")
    op.drop_index(op.f("ix_study_sheets_rater_id"), table_name="study_sheets")
    op.drop_table("study_sheets")
    op.drop_table("study_raters")
    op.drop_table("study_audit")
    op.drop_table("studies")
