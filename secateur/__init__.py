"""Structured pruning of large language models."""

__version__ = "0.2.0"
