"""Make a random Llama of 100,000 parameters with a tokenizer and texts: ``python tiny_model.py FOLDER``.

The texts calibrate and evaluate the model. This file imports nothing of the project, because the tests of the
distribution run it in fresh environments.
"""

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the river runs under a bridge where children count boats and the keeper of the light writes home"
SENTENCES = 600


def text(seed: int) -> str:
    """Return random sentences."""
    choose = random.Random(seed)
    return " ".join(" ".join(choose.choices(WORDS.split(), k=9)).capitalize() + "." for _ in range(SENTENCES))


def make(folder: Path) -> None:
    """Write ``model/``, ``calibration.txt`` and ``evaluation.txt`` into ``folder``."""
    for seed, name in enumerate(("calibration", "evaluation")):
        (folder / f"{name}.txt").write_text(text(seed))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(0)], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
