"""The vocabulary that API and engine share: the pruning spec, the methods, what an architecture looks like.

Pure data and arithmetic on pydantic: no torch, no web, no database, so both sides can import it.
"""
