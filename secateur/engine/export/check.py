"""The check of a written checkpoint.

A fresh process that does not use this project must load the checkpoint and compute the same results.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import Decoder
from secateur.processes import run

SCRIPT = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, probe, threads, own_code = sys.argv[1:]
torch.set_num_threads(int(threads))
expected = load_file(probe)
AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=own_code == "True", dtype="auto", output_loading_info=True
)
wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
assert not wrong, f"tensors that do not fit: {wrong[:3]}"
tokens = expected["tokens"]
with torch.no_grad():
    logits = model.eval()(tokens).logits.float()
allowed = float(expected["tolerance"]) * max(expected["logits"].abs().max().item(), 1.0)
def most(differences):
    # A token that is sent to another expert for a rounding's sake is no fault, as long as they are few.
    few = int(float(expected["rerouted"]) * differences.numel())
    return differences.flatten().sort().values[-1 - few].item()
difference = most((logits - expected["logits"]).abs().amax(-1))
assert difference <= allowed, f"logits differ by {difference}"
model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=int(expected["new_tokens"]))
with torch.no_grad():
    logits = model(written[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :].float()
short = most(logits.max(-1).values - logits.gather(2, written[:, tokens.shape[1] :, None])[..., 0])
assert short <= 2 * allowed, f"generate with a cache writes other tokens than without: logits differ by {short}"
"""
NEW_TOKENS = 12
REROUTED = 0.15
"""Share of tokens that a mixture of experts in half precision may send to other experts than the model in memory
does."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def check_checkpoint(decoder: Decoder, folder: Path, own_code: bool) -> None:
    """Load ``folder`` with plain transformers in a new process and compare the logits with the model in memory.

    With ``own_code``, the model is loaded with the checkpoint's code, all of which is ours. The process also generates
    greedily with a cache: every token must be the one that the whole text so far gives without a cache.

    Raises:
        PruningError: ``export_invalid``; the files must not be published then. ``out_of_memory``.
    """
    tokens = probe_tokens(decoder)
    with torch.no_grad(), decoder.routed():
        logits = decoder.model(tokens.to(decoder.device), use_cache=False).logits.float().cpu()
    rounds = decoder.shape.family.experts and decoder.model.dtype != torch.float32
    expected = {"tokens": tokens.contiguous(), "logits": logits.contiguous()}
    expected |= {"new_tokens": torch.tensor(NEW_TOKENS), "rerouted": torch.tensor(REROUTED if rounds else 0.0)}
    run_check(SCRIPT, decoder, folder, expected, str(own_code))


def run_check(script: str, decoder: Decoder, folder: Path, expected: dict[str, Tensor], *arguments: str) -> None:
    """Run ``script`` in a new process.

    The arguments of the script are the folder, a file of the tensors ``expected`` and ``tolerance``, the number of
    threads, and ``arguments``.

    Raises:
        PruningError: ``export_invalid`` with the last line of the script's error output, or ``out_of_memory``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        save_file({**expected, "tolerance": torch.tensor(TOLERANCE[decoder.model.dtype])}, probe)
        command = [sys.executable, "-I", "-c", script, str(folder.resolve()), str(probe), str(torch.get_num_threads())]
        done = run([*command, *arguments], cwd=scratch)
    if done.returncode < 0:
        raise PruningError(
            ErrorCode.OUT_OF_MEMORY,
            "The check of the written checkpoint was killed, probably for want of memory (it loads the model once more).",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PruningError(ErrorCode.EXPORT_INVALID, f"The written checkpoint does not load as it should: {reason}")


def probe_tokens(decoder: Decoder, length: int = 48) -> torch.Tensor:
    """Return fixed random tokens ``[2, length]`` by which a written checkpoint is checked.

    The tokens begin with the model's opening.
    """
    generator = torch.Generator().manual_seed(0)
    length = max(min(length, decoder.shape.max_positions - NEW_TOKENS), 1)
    tokens = torch.randint(decoder.shape.vocab_size, (2, length), generator=generator)
    return torch.cat([decoder.opening.expand(2, -1), tokens], 1)[:, :length]
