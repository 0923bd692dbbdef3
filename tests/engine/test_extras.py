"""The engine with the extra ``engine`` alone."""

import importlib.util
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from secateur import PruningError, prune
from secateur.client.report import Report, compare
from tests.engine.models import english

find_spec = importlib.util.find_spec


@pytest.fixture
def without_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "secateur.extras.find_spec", lambda name: None if name in ("matplotlib", "lm_eval") else find_spec(name)
    )


def test_a_card_has_no_picture_without_matplotlib(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, without_eval: None
) -> None:
    texts = english("calibration")
    result = prune(trained, tokenizer=tokenizer, ratio=0.3, method="magnitude", data=texts, progress=False)
    result.save(tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "widths.png").exists()
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "widths.png" not in card and "\n\n| layer | KV groups |" in card


def test_plots_and_zero_shot_tasks_name_the_extra(
    trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, without_eval: None
) -> None:
    with pytest.raises(ImportError, match=r"^Drawing a report needs .* \(matplotlib\): pip install 'secateur\[eval\]'"):
        compare([Report({"parameters": {"before": 2, "after": 1}, "perplexity": {"before": 3.0, "after": 4.0}})])
    recipe = {"target_ratio": 0.3, "method": "magnitude", "evaluation": {"zero_shot": ["piqa"]}}
    with pytest.raises(PruningError, match=r"^Zero-shot evaluation needs .* \(lm_eval\)") as caught:
        prune(trained, tokenizer=tokenizer, data=english("calibration"), recipe=recipe, progress=False)
    assert caught.value.code == "dependency_missing" and caught.value.field == "evaluation.zero_shot"
