"""The bundle that published figures, latency, preferences and claims came in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("reported", "latencies", "preferences", "claims")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("origin", sa.Text(), nullable=True))


def downgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as columns:
            columns.drop_column("origin")
