"""Contain the history of the database schema, which :mod:`app.db.migrate` runs."""
