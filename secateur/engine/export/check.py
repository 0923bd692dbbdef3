"""The check of a written checkpoint.

The files must hold the tensors of the model in memory bit for bit, and a fresh process that does not use this project
must load them and compute the same results. Results are compared in float32, whatever the dtype of the weights, because
two correct implementations differ by more in half precision than a wrong one may (SmolLM2 in bfloat16: by 2 to 9 % of the
largest logit between two attention kernels; in float32: by 0.0002 %).
"""

import gc
import inspect
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.evaluation.size import weight_bytes
from secateur.engine.export.checkpoint import weights
from secateur.engine.model import in_float32
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.in_float32 import InFloat32
from secateur.processes import run

SCRIPT = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, probe, threads, device, own_code = sys.argv[1:]
torch.set_num_threads(int(threads))
expected = load_file(probe)
AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=own_code == "True", dtype="auto", output_loading_info=True
)
wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
assert not wrong, f"tensors that do not fit: {wrong[:3]}"
model.to(device).eval()
tokens = expected["tokens"].to(device)
allowed = float(expected["allowed"])
with torch.no_grad(), InFloat32():
    difference = (model(tokens, use_cache=False).logits.cpu() - expected["logits"]).abs().max().item()
    assert difference <= allowed, f"logits differ by {difference}"
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=int(expected["new_tokens"]))
    logits = model(written[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :]
    short = logits.max(-1).values - logits.gather(2, written[:, tokens.shape[1] :, None])[..., 0]
    short = short.max().item()
    assert short <= 2 * allowed, f"generate with a cache writes other tokens than without: logits differ by {short}"
"""
NEW_TOKENS = 12
ROOM = 1.5
"""Memory that a model needs to be checked, as a multiple of its weights, on a device other than the CPU."""
LEAST_ALLOWED, KERNELS = 5e-5, 8.0
"""Allowed difference of logits: the share of the largest logit that is always allowed, and how many times the difference
between two attention kernels is."""


def check_checkpoint(decoder: Decoder, folder: Path, own_code: bool) -> None:
    """Compare the tensors in ``folder`` with the model in memory, and the logits that plain transformers computes.

    A new process loads the folder on the model's device. With ``own_code``, the model is loaded with the checkpoint's
    code, all of which is ours. The process also generates greedily with a cache: every token must be the one that the
    whole text so far gives without a cache.

    Raises:
        PruningError: ``export_invalid``; the files must not be published then. ``out_of_memory``.
    """
    _check_tensors(decoder, folder)
    tokens = probe_tokens(decoder)
    with decoder.routed():
        logits = expected_logits(lambda: decoder.model(tokens.to(decoder.device), use_cache=False).logits)
    expected = {"tokens": tokens.contiguous(), "new_tokens": torch.tensor(NEW_TOKENS), **logits}
    run_check(SCRIPT, decoder, folder, expected, str(own_code))


def expected_logits(compute: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return what a script of :func:`run_check` must find: the ``logits`` of ``compute`` in float32, and the difference that is ``allowed``.

    The bound follows from how far apart two attention kernels are on the same weights.
    """
    with torch.no_grad(), InFloat32():
        logits = compute().cpu().contiguous()
        with sdpa_kernel(SDPBackend.MATH):
            kernels = (compute().cpu() - logits).abs().max()
    return {
        "logits": logits,
        "allowed": torch.maximum(LEAST_ALLOWED * logits.abs().max().clamp_min(1.0), KERNELS * kernels),
    }


def _check_tensors(decoder: Decoder, folder: Path) -> None:
    """Compare every tensor in the files with the model's tensor of that name, bit for bit."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("model*.safetensors"))]
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name, tensor in chain.from_iterable(group.items() for group in weights(decoder)):
            if name not in stored:
                raise _invalid(f"the tensor {name} is missing")
            if not _same_bits(tensor.cpu(), stored.pop(name).get_tensor(name)):
                raise _invalid(f"the tensor {name} is not the model's")
    if stored:
        raise _invalid(f"the model has no tensor {next(iter(stored))}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _invalid(reason: str) -> PruningError:
    return PruningError(ErrorCode.EXPORT_INVALID, f"The written checkpoint does not load as it should: {reason}")


def run_check(script: str, decoder: Decoder, folder: Path, expected: dict[str, Tensor], *arguments: str) -> None:
    """Run ``script`` in a new process.

    The script may use :class:`InFloat32`. Its arguments are the folder, a file of the tensors ``expected``, the number
    of threads, the model's device, and ``arguments``.

    Raises:
        PruningError: ``export_invalid`` with the last line of the script's error output, or ``out_of_memory``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        save_file(expected, probe)
        command = [sys.executable, "-I", "-c", inspect.getsource(in_float32) + script]
        given = [folder.resolve(), probe, torch.get_num_threads(), _device(decoder), *arguments]
        done = run([*command, *map(str, given)], cwd=scratch)
    if done.returncode < 0 or "OutOfMemoryError" in done.stderr:
        raise PruningError(
            ErrorCode.OUT_OF_MEMORY,
            "The check of the written checkpoint was killed, probably for want of memory (it loads the model once more).",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise _invalid(reason)


def _device(decoder: Decoder) -> torch.device:
    """Return the device on which the model is loaded once more: its own, or the CPU if its own has no room for two."""
    if decoder.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(decoder.device)[0] < ROOM * weight_bytes(decoder):
            return torch.device("cpu")
    return decoder.device


def probe_tokens(decoder: Decoder, length: int = 48) -> torch.Tensor:
    """Return fixed random tokens ``[2, length]`` by which a written checkpoint is checked.

    The tokens begin with the model's opening.
    """
    generator = torch.Generator().manual_seed(0)
    length = max(min(length, decoder.shape.max_positions - NEW_TOKENS), 1)
    tokens = torch.randint(decoder.shape.vocab_size, (2, length), generator=generator)
    return torch.cat([decoder.opening.expand(2, -1), tokens], 1)[:, :length]
