"""Alembic's entry point; ``leaderboard.database`` hands over an open connection, so no alembic.ini is needed."""

from alembic import context

from leaderboard.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    transactional_ddl=True,  # true of SQLite too, since we begin transactions ourselves
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
