"""Prefill and decode time, and the memory that takes."""

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from workers.engine.decoder import Decoder

PREFILL_TOKENS = 256
DECODE_TOKENS = 16
REPEATS = 5
UNSTEADY = 1.5
"""Between the slowest repeat and the fastest: on a machine with nothing else to do they are a few percent apart."""


@torch.no_grad()
def measure_latency(decoder: Decoder) -> dict[str, Any]:
    """Medians over repeats at batch 1: ``prefill_ms`` for 256 tokens, ``decode_ms_per_token`` with a KV cache after them.

    ``peak_memory_bytes`` is the device's peak on CUDA, the process's peak resident set on the CPU, while doing so.
    ``spread`` gives each quantity's smallest and largest repeat.
    """
    model, device = decoder.model, decoder.device
    length = min(PREFILL_TOKENS, decoder.shape.max_positions - DECODE_TOKENS)
    tokens = (torch.arange(length, device=device) % decoder.shape.vocab_size)[None]
    reset_peak_memory(device)
    prefill, decode = [], []
    for repeat in range(REPEATS + 1):
        started = now(device)
        output = model(tokens, use_cache=True, logits_to_keep=1)
        filled = now(device)
        for _ in range(DECODE_TOKENS):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        ended = now(device)
        if repeat:  # the first one warms up
            prefill.append((filled - started) * 1000)
            decode.append((ended - filled) * 1000 / DECODE_TOKENS)
    return {
        "prefill_ms": statistics.median(prefill),
        "decode_ms_per_token": statistics.median(decode),
        "spread": {"prefill_ms": [min(prefill), max(prefill)], "decode_ms_per_token": [min(decode), max(decode)]},
        "prefill_tokens": length,
        "batch_size": 1,
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def unsteady(latency: Mapping[str, Any] | None) -> bool:
    """Whether repeats of what :func:`measure_latency` measured are too far apart to be compared with another's."""
    return latency is not None and any(most > UNSTEADY * least for least, most in latency["spread"].values())


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """From here on :func:`peak_memory` counts, as far as the system allows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what scoring freed: it would count as the model's
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    except (AttributeError, OSError):
        pass


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak on CUDA, the process's peak resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
