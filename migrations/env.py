"""Run the migrations for Alembic, on the connection and in the transaction that :mod:`app.db.migrate` opened."""

from alembic import context

from app.db import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables.metadata)
context.run_migrations()
