"""Alembic's entry: runs the migrations on the connection that :mod:`app.db.migrate` opened, in its transaction."""

from alembic import context

from app.db import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables.metadata)
context.run_migrations()
