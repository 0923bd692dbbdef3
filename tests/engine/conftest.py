"""Models for the engine's tests, made once a session."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.engine.models import SIZES, make_tokenizer, save, train
from tests.forked import checks_in_forks as checks_in_forks
from tests.forked import fork_server as fork_server


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def trained_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was trained for some seconds, saved as any model is."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return save(train(model, tokenizer, steps=250), tokenizer, tmp_path_factory.mktemp("models") / "trained")


@pytest.fixture
def trained(trained_folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(trained_folder)
    return model.eval().requires_grad_(False)
