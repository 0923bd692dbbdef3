"""A published checkpoint takes adapters as its stock model does: PEFT's own defaults, a step, saved, loaded, merged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.engine.model.decoder import token_losses
from tests.engine.models import LIKE_LLAMA, VOCABULARY
from tests.engine.test_export import make_case

WITHOUT_DEFAULTS = ("glm", "glm4", "phi3", "mixtral", "qwen3-moe", *LIKE_LLAMA)
"""PEFT has no target modules of its own for most of these types, pruned or not."""


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", *WITHOUT_DEFAULTS, "gpt2", "gpt-neox", "opt"]
)
def test_lora(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = make_case(name, tmp_path, tokenizer).folder / "pruned"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits.detach()
    targets = "all-linear" if name in WITHOUT_DEFAULTS else None
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    token_losses(adapted(tokens).logits, tokens).mean().backward()
    optimizer.step()
    trained = adapted.eval()(tokens).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    scale = float(trained.abs().max())
    assert torch.allclose(loaded(tokens).logits, trained, atol=1e-5 * scale)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, trained, atol=1e-4 * scale)
