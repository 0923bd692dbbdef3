"""The database schema's history; run by :mod:`app.db.migrate`."""
