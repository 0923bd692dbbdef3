"""The pruning engine: from a model and a resolved request to a smaller model. It needs no service."""
