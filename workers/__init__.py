"""Celery workers of the service, and the programs that run the service."""

SERVICE_OF = "secateur 0.2.0"
"""Release of the library that this service belongs to.

The console script ``secateur`` compares this release with its own.
"""
