"""The definitions that the API and the engine share: the pruning spec, the methods, the descriptions of architectures.

The package contains data and arithmetic on pydantic only, without torch, a web framework or a database, so both the API
and the engine can import it.
"""
