"""The check of a dynamic checkpoint: fresh processes load it as the plain and as the dynamic model."""

from pathlib import Path

import torch

from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.export import check_checkpoint, run_check
from secateur.engine.export.check import NEW_TOKENS, expected_logits, probe_tokens

SCRIPT = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig
folder, probe, threads, device = sys.argv[1:]
torch.set_num_threads(int(threads))
expected = load_file(probe)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").to(device).eval()
tokens, read = expected["tokens"].to(device), int(expected["read"])
positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
with torch.no_grad(), InFloat32():
    prompt = model(tokens[:, :read], use_cache=True)
    model.settle(prompt.past_key_values)
    rest = model(tokens[:, read:], past_key_values=prompt.past_key_values, position_ids=positions[:, read:], use_cache=True)
difference = (torch.cat([prompt.logits, rest.logits], 1).cpu() - expected["logits"]).abs().max().item()
assert difference <= float(expected["allowed"]), f"logits of what writes differ by {difference}"
model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
new = int(expected["new_tokens"])
with InFloat32():
    written = model.generate(tokens[:, :read], attention_mask=torch.ones_like(tokens[:, :read]), max_new_tokens=new)
assert written.shape[1] == read + new, f"generate wrote {written.shape[1] - read} tokens"
"""


def check_dynamic(runtime: Runtime, folder: Path) -> None:
    """Load ``folder`` as the plain model and then with its own code, and compare both with the model in memory.

    Raises:
        PruningError: ``export_invalid``; the files must not be published then. ``out_of_memory``.
    """
    check_checkpoint(runtime, folder, own_code=False)
    tokens = probe_tokens(runtime)
    read = tokens.shape[1] // 2
    logits = expected_logits(lambda: runtime.logits(tokens.to(runtime.device), read))
    given = {"tokens": tokens.contiguous(), "read": torch.tensor(read), "new_tokens": torch.tensor(NEW_TOKENS)}
    run_check(SCRIPT, runtime, folder, given | logits)
