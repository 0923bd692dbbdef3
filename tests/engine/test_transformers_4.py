"""What is written also loads in transformers 4.57: ``make test-compat``, which makes an environment that has it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.engine.models import LIKE_LLAMA, make_model, save
from tests.engine.test_dynamic import DENSE, PROMPTS
from tests.engine.test_dynamic import Case as DynamicCase
from tests.engine.test_export import CASES, ROTATIONS, STOCK_CASES, Case, disagreements, make_case, show_stranger

PYTHON = os.environ.get("SECATEUR_TRANSFORMERS_4")
UNKNOWN = [f"{name} {layout}".rstrip() for name in LIKE_LLAMA if name != "stablelm" for layout in ("", "uniform")]
"""Transformers 4's StableLM does without ``head_dim``: its heads cannot be fewer."""
ROTATED = [f"{name} {layout}".rstrip() for name in ROTATIONS for layout in ("", "uniform", "padded")]
NAMES = [*CASES, *STOCK_CASES, *UNKNOWN, *ROTATED]
STOCK_FAULTS = {"gemma2": {"logits", "base_logits"}, "gemma3": {"base_logits"}, "two": {"base_logits"}}
"""What transformers 4's own classes do wrong, pruned or not: SDPA drops Gemma 2's soft-capping, AutoModel finds none of Gemma 3's
weights. Our own file mends both where a checkpoint needs one."""

WRITER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    # its SDPA drops Gemma 2's soft-capping
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    prompts = load_file(folder + "/prompts.safetensors")["prompts"]
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    written = {"once": model.generate(prompts, **options)}
    model.config.dynamic_pruning["refresh_tokens"] = 3
    written["refreshed"] = model.generate(prompts, **options)
    save_file(written, folder + "/written.safetensors")
"""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="run by make test-compat")


@pytest.fixture(scope="module")
def cases(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every case written by this transformers and loaded by the other."""
    assert PYTHON is not None
    root = tmp_path_factory.mktemp("transformers-4")
    made = {name: make_case(name, root / name, tokenizer) for name in (*CASES, *STOCK_CASES, *UNKNOWN)}
    for name in ROTATED:
        rotation, _, layout = name.partition(" ")
        family, changes, _ = ROTATIONS[rotation]
        made[name] = make_case(f"{family} {layout}".rstrip(), root / name, tokenizer, **changes)
    show_stranger(Path(PYTHON).absolute(), made.values())
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_with_transformers_4_can_load_it(name: str, cases: dict[str, Case]) -> None:
    kind, _, layout = name.partition(" ")
    assert disagreements(cases[name]) == (STOCK_FAULTS.get(kind, set()) if layout else set())


def test_dynamic_models_write_the_same_in_transformers_4(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert PYTHON is not None
    cases = {}
    for name in DENSE:
        (tmp_path / name).mkdir()
        source = save(make_model(name), tokenizer, tmp_path / name / "source")
        cases[name] = DynamicCase(source, tmp_path / name / "dynamic")
        save_file({"prompts": PROMPTS}, cases[name].folder / "prompts.safetensors")
    command = [str(Path(PYTHON).absolute()), "-I", "-c", WRITER, *(str(case.folder) for case in cases.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = {
        "attention_mask": torch.ones_like(PROMPTS),
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
    }
    differing = set()
    for name, case in cases.items():
        model, written = case.load(), load_file(case.folder / "written.safetensors")
        for kind, every in (("once", None), ("refreshed", 3)):
            model.config.dynamic_pruning["refresh_tokens"] = every
            if not torch.equal(model.generate(PROMPTS, **options), written[kind]):
                differing.add((name, kind))
    assert not differing
