"""A smaller vocabulary: tokens, bytes and decode time against the growth of texts and the loss per byte.

SmolLM2 is cut for one kind of text, and measured on the held-out part of this text and on other texts. A tokenizer of
100,000 tokens, which is trained here, is cut in the same way, without a model.
"""

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.common import settings, versions_line
from benchmarks.model import load_smollm2
from benchmarks.table import markdown
from secateur.engine.evaluation.latency import Protocol, measure_latency
from secateur.engine.evaluation.per_byte import nats_per_byte
from secateur.engine.model.decoder import Decoder
from secateur.engine.structures.vocabulary import Vocabulary, choose, cut_decoder, cut_tokenizer, named_tokens

HELD_OUT = "held out"
HELD_OUT_SHARE = 0.2
GROWTHS = (0.0, 0.01, 0.05)
"""The largest allowed growth of the token count, by which vocabularies are chosen."""
ONCE = Protocol(decode_batch=1, decode_tokens=8, decode_prompt=32, repeats=1, prefill_tokens=32)
REPEATS = 7
WINDOW = 512
TRAINED = 100_000
"""Tokens of the tokenizer that is trained."""
EXAMPLE_WIDTH = 2048
"""The hidden size for which the bytes of that tokenizer's table are given, in bfloat16."""


@dataclass(frozen=True)
class Texts:
    """The text by which tokens are chosen, and the texts that are measured, by name."""

    chosen_by: list[str]
    measured: dict[str, list[str]]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    texts = read(arguments)
    decoder = load_smollm2(arguments.dtype, "as-is")
    shared = settings(arguments, decoder.device.type)
    text = f"""# Vocabulary

`make bench-vocabulary`: tokens are chosen by {len(texts.chosen_by):,} paragraphs of {Path(arguments.calibration).name}, \
{sum(map(len, texts.chosen_by)) / 1e6:.1f} M characters. Of each measured text, the first {arguments.characters:,} characters count.

{_of_a_model(decoder, texts, shared, arguments)}

{_of_a_trained_tokenizer(texts)}

{versions_line(shared)}
"""
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "vocabulary.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.vocabulary", description=__doc__)
    made.add_argument("--calibration", type=Path, required=True, help="a text file; its last fifth is held out")
    made.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=FILE", help="text files")
    made.add_argument("--characters", type=int, default=20_000, help="the part of each measured text")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return made.parse_args()


def read(arguments: argparse.Namespace) -> Texts:
    paragraphs = [part for part in arguments.calibration.read_text(encoding="utf-8").split("\n") if part.strip()]
    cut = int(len(paragraphs) * (1 - HELD_OUT_SHARE))
    files = dict(pair.partition("=")[::2] for pair in arguments.evaluation)
    whole = {HELD_OUT: "\n".join(paragraphs[cut:])}
    whole |= {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
    return Texts(paragraphs[:cut], {name: [text[: arguments.characters]] for name, text in whole.items()})


def _of_a_model(decoder: Decoder, texts: Texts, shared: dict[str, Any], arguments: argparse.Namespace) -> str:
    before = {name: _nats(decoder, text) for name, text in texts.measured.items()}
    rows = [
        ["unpruned", f"{decoder.shape.vocab_size:,}", f"{decoder.parameters / 1e6:.1f} M", "1", *_cells(before, {})]
    ]
    for growth in GROWTHS:
        began = time.monotonic()
        named = named_tokens(decoder.model)
        choice = choose(decoder.tokenizer, texts.chosen_by, decoder.shape.vocab_size, named, growth)
        seconds = time.monotonic() - began
        cut = Decoder(copy.deepcopy(decoder.model), decoder.tokenizer, decoder.shape)
        cut_decoder(cut, choice.vocabulary)
        after = {name: _nats(cut, text) for name, text in texts.measured.items()}
        grown = {name: _growth(decoder.tokenizer, cut.tokenizer, text) for name, text in texts.measured.items()}
        rows.append(
            [
                f"{growth:.0%}",
                f"{cut.shape.vocab_size:,}",
                f"{cut.parameters / 1e6:.1f} M",
                _decode_time(decoder, cut),
                *_cells(after, grown),
            ]
        )
        print(f"{growth:.0%}: {rows[-1]}, chosen in {seconds:.0f} s", file=sys.stderr, flush=True)
    heads = ["allowed growth", "tokens", "parameters", "decode time", *texts.measured]
    return f"""## SmolLM2

{shared["model"]}, {shared["dtype"]} on {shared["device"]}, number of threads: {arguments.threads}. A cell of a text has the loss in nats a \
byte, and by how much the token count of the text grows. The decode time is that of a token at batch 1 as a share of the unpruned \
model's, the median of {REPEATS} repeats that alternate between both models; texts that grow take so many more tokens.

{markdown(heads, rows)}"""


def _cells(nats: dict[str, float], grown: dict[str, float]) -> list[str]:
    return [f"{value:.4f}" + (f" ({grown[name]:+.1%})" if name in grown else "") for name, value in nats.items()]


def _nats(decoder: Decoder, texts: Sequence[str]) -> float:
    return nats_per_byte(decoder.model, decoder.tokenizer, texts, WINDOW)


def _growth(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    old, new = (sum(len(each.encode(text, add_special_tokens=False)) for text in texts) for each in (before, after))
    return new / old - 1


def _decode_time(decoder: Decoder, cut: Decoder) -> str:
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for model, times in zip((decoder, cut), taken, strict=True):
            times.append(measure_latency(model, ONCE).decode_ms_per_token)
    return f"{statistics.median(taken[1]) / statistics.median(taken[0]):.3f}"


def _of_a_trained_tokenizer(texts: Texts) -> str:
    tokenizer = train([*texts.chosen_by, *(text for each in texts.measured.values() for text in each), *_words()])
    size = len(tokenizer)
    rows = []
    for growth in GROWTHS:
        began = time.monotonic()
        choice = choose(tokenizer, texts.chosen_by, size, (), growth)
        seconds = time.monotonic() - began
        cut = cut_tokenizer(tokenizer, choice.vocabulary)
        failed = sum(not _returns(cut, text) for text in (*_strange_texts(), *texts.chosen_by[::20]))
        grown = {name: _growth(tokenizer, cut, text) for name, text in texts.measured.items()}
        rows.append(
            [
                f"{growth:.0%}",
                f"{choice.vocabulary.size:,}",
                f"{_megabytes(choice.vocabulary):.0f} of {size * EXAMPLE_WIDTH * 2 / 1e6:.0f} MB",
                str(failed),
                *(f"{value:+.1%}" for value in grown.values()),
                f"{seconds:.0f} s",
            ]
        )
        print(f"{growth:.0%}: {rows[-1]}", file=sys.stderr, flush=True)
    heads = ["allowed growth", "tokens", "table", "texts that do not return", *texts.measured, "choice takes"]
    return f"""## A tokenizer of {size:,} tokens

A byte-level BPE that is trained here, on these texts and on made-up words, which fill the table with tokens that the texts do not need. The \
table is the embedding in bfloat16 at a hidden size of {EXAMPLE_WIDTH:,}. A text returns if it decodes to itself: {len([*_strange_texts()]):,} \
random texts from all of Unicode, and one paragraph of {20}.

{markdown(heads, rows)}"""


def train(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of :data:`TRAINED` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _words() -> Iterator[str]:
    """Yield texts of made-up words, two of each."""
    dice = random.Random(0)
    for _ in range(2_000):
        words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(4, 9))) for _ in range(40)]
        yield " ".join(words * 2)


def _strange_texts() -> Iterator[str]:
    dice = random.Random(1)
    for _ in range(2_000):
        codes = (dice.randrange(0x110000) for _ in range(dice.randint(1, 40)))
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _returns(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text)


def _megabytes(vocabulary: Vocabulary) -> float:
    return vocabulary.size * EXAMPLE_WIDTH * 2 / 1e6


if __name__ == "__main__":
    main()
