"""``make bench-quality`` and ``make bench-speed``: every method on SmolLM2-135M, on one set of tokens."""
