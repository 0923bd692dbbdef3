"""What is written also loads in transformers 4.57: ``make test-compat``, which makes an environment that has it."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.engine.models import LIKE_LLAMA
from tests.engine.test_export import CASES, ROTATIONS, STOCK_CASES, Case, disagreements, make_case, show_stranger

PYTHON = os.environ.get("SECATEUR_TRANSFORMERS_4")
UNKNOWN = [f"{name} {layout}".rstrip() for name in LIKE_LLAMA if name != "stablelm" for layout in ("", "uniform")]
"""Transformers 4's StableLM does without ``head_dim``: its heads cannot be fewer."""
ROTATED = [f"{name} {layout}".rstrip() for name in ROTATIONS for layout in ("", "uniform", "padded")]
NAMES = [*CASES, *STOCK_CASES, *UNKNOWN, *ROTATED]
STOCK_FAULTS = {"gemma2": {"logits", "base_logits"}, "gemma3": {"base_logits"}, "two": {"base_logits"}}
"""What transformers 4's own classes do wrong, pruned or not: SDPA drops Gemma 2's soft-capping, AutoModel finds none of Gemma 3's
weights. Our own file mends both where a checkpoint needs one."""

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
