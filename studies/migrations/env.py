"""Alembic's entry point; ``leaderboard.database.migrate`` hands over an open connection and the version table."""

from alembic import context

from studies.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,  # true of SQLite too, since we begin transactions ourselves
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
