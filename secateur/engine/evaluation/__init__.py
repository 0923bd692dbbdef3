"""Measure the quality and the cost of a model: perplexity, zero-shot accuracy, generated text, latency and size."""

from secateur.engine.evaluation.latency import measure_latency, unsteady
from secateur.engine.evaluation.perplexity import perplexity
from secateur.engine.evaluation.size import forward_flops, weight_bytes
from secateur.engine.evaluation.suite import Suite, compare_benchmarks, compare_generations

__all__ = [
    "Suite",
    "compare_benchmarks",
    "compare_generations",
    "forward_flops",
    "measure_latency",
    "perplexity",
    "unsteady",
    "weight_bytes",
]
