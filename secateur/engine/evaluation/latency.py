"""Measure the time of prefill and decoding, and the memory and energy that both take."""

import ctypes
import gc
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.contract.report import Latency, Spread
from secateur.engine.evaluation.energy import energy_meter
from secateur.engine.model.decoder import Decoder

UNSTEADY = 1.5
"""Ratio of the slowest repeat to the fastest above which a measurement is unsteady.

On a machine with nothing else to do, the repeats differ by a few percent.
"""


@dataclass(frozen=True)
class Protocol:
    """The prefill and the decoding that are timed.

    The prefill is of one prompt of ``prefill_tokens``. Decoding takes ``decode_tokens`` steps of ``decode_batch``
    sequences that begin with ``decode_prompt`` tokens.
    """

    decode_batch: int
    decode_tokens: int
    decode_prompt: int
    repeats: int
    prefill_tokens: int = 256


QUICK = Protocol(decode_batch=1, decode_tokens=16, decode_prompt=256, repeats=5)
SLIMLLM = Protocol(decode_batch=8, decode_tokens=256, decode_prompt=1, repeats=20)
"""Protocol of Guo et al., section 5.3 and table 3.

The authors give means. They do not give the length of the prompts of decoding, so the protocol uses the shortest: one
token.
"""


@torch.no_grad()
def measure_latency(decoder: Decoder, protocol: Protocol = QUICK) -> Latency:
    """Return the latency of the model, as medians over repeats.

    ``prefill_ms``, ``decode_ms_per_token`` (of one step of the batch, with a KV cache) and ``tokens_per_second`` of
    decoding (all sequences of the batch together) are medians. ``peak_memory_bytes`` is the peak during the
    measurement: the device's on CUDA, the process's peak resident set on the CPU. ``spread`` gives the smallest and the
    largest repeat of each quantity. ``energy_joules_per_token`` is the energy that the device used for decoding, or
    ``None`` where the machine does not count energy.
    """
    device, positions = decoder.device, decoder.shape.max_positions
    steps = min(protocol.decode_tokens, positions - 1)
    length = min(protocol.prefill_tokens, positions - min(steps, QUICK.decode_tokens))
    prompt = min(protocol.decode_prompt, positions - steps)
    reset_peak_memory(device)
    meter, joules = energy_meter(device), 0.0
    prefill, decode = [], []
    for repeat in range(protocol.repeats + 1):
        prefilled = _prefill(decoder, 1, length)
        same = (protocol.decode_batch, prompt) == (1, length)
        filled = prefilled if same else _prefill(decoder, protocol.decode_batch, prompt)
        begun = meter() if meter else 0.0
        seconds = _decode(decoder, filled.output, steps)
        if repeat:  # the first repeat warms up
            prefill.append(prefilled.seconds * 1000)
            decode.append(seconds * 1000 / steps)
            joules += meter() - begun if meter else 0.0
        del prefilled, filled
    tokens = protocol.repeats * protocol.decode_batch * steps
    return Latency(
        prefill_ms=statistics.median(prefill),
        decode_ms_per_token=statistics.median(decode),
        tokens_per_second=1000 * protocol.decode_batch / statistics.median(decode),
        energy_joules_per_token=joules / tokens if meter else None,
        spread=Spread(prefill_ms=(min(prefill), max(prefill)), decode_ms_per_token=(min(decode), max(decode))),
        prefill_tokens=length,
        decode_tokens=steps,
        batch_size=protocol.decode_batch,
        repeats=protocol.repeats,
        peak_memory_bytes=peak_memory(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
    )


class _Filled(NamedTuple):
    output: Any
    seconds: float


def _prefill(decoder: Decoder, batch: int, length: int) -> _Filled:
    tokens = (torch.arange(length, device=decoder.device) % decoder.shape.vocab_size).expand(batch, -1)
    started = now(decoder.device)
    output = decoder.model(tokens, use_cache=True, logits_to_keep=1)
    return _Filled(output, now(decoder.device) - started)


def _decode(decoder: Decoder, output: Any, steps: int) -> float:
    """Return the seconds that ``steps`` steps of decoding take."""
    started = now(decoder.device)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = decoder.model(token, past_key_values=output.past_key_values, use_cache=True)
    return now(decoder.device) - started


def unsteady(latency: Latency | None) -> bool:
    """Return whether repeats of :func:`measure_latency` are too far apart to be compared with another measurement."""
    return latency is not None and any(
        most > UNSTEADY * least for least, most in (latency.spread.prefill_ms, latency.spread.decode_ms_per_token)
    )


def now(device: torch.device) -> float:
    """Return the seconds on a clock after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count of :func:`peak_memory`, as far as the system allows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count as the model's
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    except (AttributeError, OSError):
        pass


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: the device's on CUDA, the process's peak resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
