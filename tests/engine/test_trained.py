"""Models that have learned something, of families with modules of another make: what pruning costs them means something."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.spec import PruningSpec
from tests.engine.models import FAMILIES, SIZES, english, save, train
from tests.engine.running import prune

WIDER = {
    "gpt2": {"n_embd": 96, "n_inner": 384},
    "gpt-neox": {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDER)
def test_methods_rank_as_they_should(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config_class, own = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **own, **WIDER[name]}))
    folder = save(train(model, tokenizer, 250), tokenizer, tmp_path / "source")
    after: dict[str, float] = {}
    before = 0.0
    for method in ("secateur", "piem-lsps", "random"):
        spec = PruningSpec.model_validate(
            {
                "target_ratio": 0.3,
                "method": method,
                "rounds": 1,
                "calibration": {"texts": english("calibration"), "samples": 24, "sequence_length": 64},
                "evaluation": {"texts": english("evaluation"), "samples": 24, "sequence_length": 64, "latency": False},
            }
        )
        report = prune(str(folder), spec, tmp_path / method).report
        before, after[method] = report["perplexity"]["before"], report["perplexity"]["after"]
    assert before < 80, "of 384 tokens"
    assert after["secateur"] < after["piem-lsps"] < after["random"]
    assert after["secateur"] < 1.3 * before
