"""What is written also loads in transformers 4.57: ``make test-compat``, which makes an environment that has it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.engine.test_export import CASES, STOCK_CASES, STRANGER, Case, make_case

PYTHON = os.environ.get("SECATEUR_TRANSFORMERS_4")
NAMES = [name for name in (*CASES, *STOCK_CASES) if not name.startswith("gpt-neox")]
"""transformers 4 calls GPT-NeoX's head otherwise, and renames no weights for custom code."""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="run by make test-compat")


@pytest.fixture(scope="module")
def cases(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every case written by this transformers and loaded by the other."""
    assert PYTHON is not None
    root = tmp_path_factory.mktemp("transformers-4")
    made = {name: make_case(name, root / name, tokenizer) for name in NAMES}
    (root / "stranger.py").write_text(STRANGER)
    command = [str(Path(PYTHON).absolute()), "-I", "stranger.py", *(str(case.folder) for case in made.values())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_with_transformers_4_can_load_it(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    results = load_file(case.folder / "results")
    scale = float(case.logits.abs().max())
    # With its default attention, transformers 4 leaves Gemma 2's soft-capping out, pruned or not.
    logits = results["eager" if name.startswith("gemma2") else "logits"]
    assert torch.allclose(logits, case.logits, atol=(0.02 if name == "bfloat16" else 1e-5) * scale)
    assert torch.equal(results["resaved"], results["logits"])
    if name != "bfloat16":
        for kind in ("none", "static", "left_padded"):
            assert torch.equal(results[kind], results["dynamic"]), kind
