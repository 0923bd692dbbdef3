"""Before a checkpoint is called done: a fresh process that has never seen this project must load it and agree."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.catalog.errors import PruningError
from workers.engine.decoder import Decoder

SCRIPT = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, probe, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
expected = load_file(probe)
AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
assert not wrong, f"tensors that do not fit: {wrong[:3]}"
tokens = expected["tokens"]
with torch.no_grad():
    logits = model.eval()(tokens).logits.float()
difference = (logits - expected["logits"]).abs().max().item()
allowed = float(expected["tolerance"]) * max(expected["logits"].abs().max().item(), 1.0)
assert difference <= allowed, f"logits differ by {difference}"
model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=int(expected["new_tokens"]))
with torch.no_grad():
    logits = model(written[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :].float()
short = (logits.max(-1).values - logits.gather(2, written[:, tokens.shape[1] :, None])[..., 0]).max().item()
assert short <= 2 * allowed, f"generate with a cache writes other tokens than without: logits differ by {short}"
"""
NEW_TOKENS = 12
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def check_checkpoint(decoder: Decoder, folder: Path) -> None:
    """Load ``folder`` with plain transformers in a new process and compare logits with the model in memory.

    There it also writes greedily with a cache: every token must be what the whole text so far gives without one.

    Raises:
        PruningError: ``export_invalid``; nothing may be published then.
    """
    tokens = _probe_tokens(decoder)
    with torch.no_grad():
        logits = decoder.model(tokens.to(decoder.device), use_cache=False).logits.float().cpu()
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        tolerance = torch.tensor(TOLERANCE[decoder.model.dtype])
        expected = {"tokens": tokens, "logits": logits.contiguous(), "tolerance": tolerance}
        save_file({**expected, "new_tokens": torch.tensor(NEW_TOKENS)}, probe)
        done = subprocess.run(
            [sys.executable, "-I", "-c", SCRIPT, str(folder.resolve()), str(probe), str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
    if done.returncode < 0:
        raise PruningError(
            "out_of_memory",
            "The check of the written checkpoint was killed, probably for want of memory (it loads the model once more).",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PruningError("export_invalid", f"The written checkpoint does not load as it should: {reason}")


def _probe_tokens(decoder: Decoder, length: int = 48) -> torch.Tensor:
    """Fixed random tokens ``[2, length]`` that a written checkpoint is checked with."""
    generator = torch.Generator().manual_seed(0)
    length = max(min(length, decoder.shape.max_positions - NEW_TOKENS), 1)
    return torch.randint(decoder.shape.vocab_size, (2, length), generator=generator)
