"""What a model is worth and what it costs: perplexity, latency, size."""

from workers.engine.evaluation.latency import measure_latency, unsteady
from workers.engine.evaluation.perplexity import perplexity
from workers.engine.evaluation.size import forward_flops, weight_bytes

__all__ = ["forward_flops", "measure_latency", "perplexity", "unsteady", "weight_bytes"]
