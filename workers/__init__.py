"""The Celery workers of the service, and the programs that run it."""

SERVICE_OF = "secateur 0.2.0"
"""The release of the library that this service belongs to; the console script ``secateur`` compares it with its own."""
