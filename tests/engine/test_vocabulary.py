"""The structure vocabulary: the choice of tokens, the tokenizer's files, the tables, and what the configs name."""

import argparse
import calendar
import inspect
import io
import json
import optparse
import subprocess
import sys
from functools import cache
from html.entities import html5
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.evaluation.per_byte import nats_per_byte
from secateur.engine.structures.vocabulary import (
    Choice,
    Vocabulary,
    choose,
    cut_model,
    cut_tokenizer,
    named_tokens,
    renumber_config,
    rewrite_files,
)
from secateur.engine.structures.vocabulary.pieces import BYTES
from tests.engine.models import make_model

PAGES = [page for page in topics.values() if len(page) > 1500]
USED, HELD_OUT = PAGES[::2], PAGES[1::8]
OTHERS = [*map(inspect.getsource, (argparse, calendar, optparse)), " ".join(html5.values()) * 3]
"""Texts for which the tokenizers have tokens that the user's texts do not need."""
TRAINING = PAGES + OTHERS
KINDS = ("byte-level", "sentencepiece", "unigram", "unigram-bytes")
ENDS = ["<unk>", "<s>", "</s>"]
TEMPLATE = "{% for message in messages %}<|turn|>{{ message.role + ' speaks: ' }}{{ message.content }}\n{% endfor %}"
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*" ".join(USED).split()[:3000], " ", "\n\n", "é", "日本", "👍🏽", "<0x41>"]), max_size=12
    ).map(" ".join),
)
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.add_tokens(["secateur"])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def like_sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    fallback = BYTES if kind != "unigram" else []
    special = [*ENDS, *fallback]
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer: Any = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=2500, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind != "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), tokenizer.normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in ENDS]
    description["model"]["byte_fallback"] = bool(fallback)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def source(kind: str) -> PreTrainedTokenizerFast:
    return byte_level() if kind == "byte-level" else like_sentencepiece(kind)


@cache
def choice(kind: str) -> Choice:
    tokenizer = source(kind)
    return choose(tokenizer, USED, len(tokenizer) + 100, multiple=16)


@cache
def cut(kind: str) -> Any:
    return cut_tokenizer(source(kind), choice(kind).vocabulary)


def written_and_read(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids))


def tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(ids) for ids in tokenizer(texts).input_ids)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=ANY_TEXT)
def test_any_text_is_written_and_read_as_by_the_source(kind: str, text: str) -> None:
    expected = written_and_read(source(kind), text)
    assert written_and_read(cut(kind), text) == expected
    if kind == "byte-level":
        assert expected == text


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=ANY_TEXT)
def test_a_text_of_kept_tokens_has_the_same_tokens_renumbered(kind: str, text: str) -> None:
    remap, ids = choice(kind).vocabulary.remap, source(kind)(text).input_ids
    if all(token in remap for token in ids):
        assert cut(kind)(text).input_ids == [remap[token] for token in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_token_is_made_from_its_own_text_as_before(kind: str) -> None:
    before, after, remap = source(kind), cut(kind), choice(kind).vocabulary.remap
    for token in remap:
        text = before.decode([token])
        ids = before(text).input_ids
        if all(each in remap for each in ids):
            assert after(text).input_ids == [remap[each] for each in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_texts_grow_within_the_bound(kind: str) -> None:
    chosen, before = choice(kind), source(kind)
    assert 0 < chosen.growth <= 0.01
    assert chosen.vocabulary.size < len(before) - 50 and chosen.vocabulary.size % 16 == 0
    assert tokens(cut(kind), HELD_OUT) <= 1.01 * tokens(before, HELD_OUT)
    wider = choose(before, USED, len(before), max_growth=0.1)
    assert wider.vocabulary.size < chosen.vocabulary.size and chosen.growth < wider.growth <= 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_special_added_and_byte_tokens_stay(kind: str) -> None:
    before, after = source(kind), cut(kind)
    assert after.get_added_vocab().keys() == before.get_added_vocab().keys()
    assert after.all_special_tokens == before.all_special_tokens
    if kind != "unigram":
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-level" else BYTES
        assert set(alphabet) <= after.get_vocab().keys()
    for side in (before, after):
        ids = side("x").input_ids
        assert side.decode(ids, skip_special_tokens=True) == "x"
        assert (ids[0] == side.bos_token_id) == (kind != "byte-level")


def test_the_tokens_of_the_chat_template_and_named_tokens_stay() -> None:
    tokenizer = source("byte-level")
    text = ["zqzq " * 300]
    vocabulary = choose(tokenizer, text, len(tokenizer), named={3210, len(tokenizer)}, max_growth=10.0).vocabulary
    assert 3210 in vocabulary.remap
    assert {*tokenizer(" speaks: ").input_ids} <= vocabulary.remap.keys()
    assert vocabulary.size < 700


def test_rows_without_a_token_go_first_and_rows_are_filled_with_tokens() -> None:
    tokenizer = source("byte-level")
    all_stay = choose(tokenizer, USED, len(tokenizer) + 500, max_growth=0.0, multiple=64).vocabulary
    used = {token for ids in tokenizer(USED).input_ids for token in ids}
    assert all_stay.size % 64 == 0 and max(all_stay.kept) < len(tokenizer) + 64
    assert len(used) <= all_stay.size
    odd = choose(tokenizer, USED, len(tokenizer) + 1, multiple=len(tokenizer)).vocabulary
    assert odd.size in (len(tokenizer), len(tokenizer) + 1)


def test_ignored_merges_and_a_piece_without_its_characters() -> None:
    description = json.loads(source("byte-level").backend_tokenizer.to_str())
    description["model"]["ignore_merges"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    vocabulary = choose(tokenizer, USED, len(tokenizer)).vocabulary
    assert vocabulary.size < len(tokenizer)
    after = cut_tokenizer(tokenizer, vocabulary)
    for text in PAGES[:4]:
        assert written_and_read(after, text) == text
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -3.0), ("zz", -1.0)], 0))
    lone = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    vocabulary = choose(lone, ["a b"], 5, max_growth=9.0, multiple=1).vocabulary
    assert vocabulary.kept == (0, 1, 2, 3, 4)  # "zz" has no other writing, and "ab" has the smallest score


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    expected = torch.load(folder + "/expected.pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("transformers."), type(model)
    ids = tokenizer(expected["text"], return_tensors="pt").input_ids
    assert torch.equal(ids, expected["ids"]), (ids, expected["ids"])
    torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == expected["logits"].shape[-1]
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > ids.shape[1] and written.max() < model.config.vocab_size
    tokenizer.decode(written[0])
"""


def test_a_saved_model_loads_in_a_fresh_process_and_computes_the_kept_logits(tmp_path: Path) -> None:
    folders = []
    for number, (name, kind, changes) in enumerate(
        [
            ("llama", "sentencepiece", {}),
            ("llama-tied", "byte-level", {}),
            ("gpt2", "byte-level", {}),
            ("gpt2", "unigram-bytes", {"tie_word_embeddings": False}),
        ]
    ):
        tokenizer, vocabulary = source(kind), choice(kind).vocabulary
        last = tokenizer.eos_token_id
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": last, "pad_token_id": last}
        model = make_model(name, vocab_size=vocabulary.rows, **ids, **changes)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        text = USED[0][:80]
        after = cut_tokenizer(tokenizer, vocabulary)
        new = after(text, return_tensors="pt").input_ids
        kept = torch.tensor(vocabulary.kept)
        with torch.no_grad():
            logits = model(kept[new]).logits[..., kept]
        sizes = cut_model(model, vocabulary)
        tables = (1 if tied else 2) * 4 * model.config.hidden_size
        assert sizes == (vocabulary.rows * tables, vocabulary.size * tables)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        after.save_pretrained(folder)
        torch.save({"text": text, "ids": new, "logits": logits}, folder / "expected.pt")
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_files_beside_the_tokenizer_are_renumbered(tmp_path: Path) -> None:
    tokenizer, vocabulary = source("byte-level"), choice("byte-level").vocabulary
    tokenizer.save_pretrained(tmp_path)
    tokenizer.backend_tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt
    added = {token: index for index, token in enumerate(tokenizer.get_added_vocab())}
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokenizer.get_added_vocab()))
    described = {str(index): {"content": token} for token, index in tokenizer.get_added_vocab().items()}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": described}))
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end], "suppress_tokens": [-1]}))
    assert rewrite_files(tmp_path, vocabulary) == []
    new = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "vocab.json").read_text()) == new.get_vocab(with_added_tokens=False)
    again = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    again.pre_tokenizer = new.pre_tokenizer
    assert again.encode(USED[0]).ids == new.encode(USED[0]).ids
    expected = {token: new.token_to_id(token) for token in added}
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == expected
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = {each["content"]: int(index) for index, each in config["added_tokens_decoder"].items()}
    assert decoder == expected
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, new.token_to_id("<|turn|>")], "suppress_tokens": [-1]}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_is_cut_with_the_fast_tokenizer(kind: str, tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for page in TRAINING[::3] for line in page.splitlines()),
        model_writer=written,
        vocab_size=1500,
        model_type=kind,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    before = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    if kind == "bpe":
        tokenizer: Any = LlamaTokenizer.from_pretrained(tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        tokenizer.save_pretrained(tmp_path)
    else:
        pieces = [(before.IdToPiece(index), before.GetScore(index)) for index in range(before.vocab_size())]
        backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = like_sentencepiece("unigram-bytes").backend_tokenizer.decoder
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    chosen = choose(tokenizer, USED, len(tokenizer), max_growth=0.05)
    assert chosen.vocabulary.size < len(tokenizer)
    assert rewrite_files(tmp_path, chosen.vocabulary) == []
    after = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert after.vocab_size() == chosen.vocabulary.size and after.unk_id() == 0
    remap = chosen.vocabulary.remap
    for line in [*USED[1].splitlines(), "日本 é 👍🏽"]:
        ids = after.EncodeAsIds(line)
        assert after.DecodeIds(ids) == line
        # transformers and sentencepiece do not treat every run of spaces alike.
        if before.EncodeAsIds(line) == tokenizer(line, add_special_tokens=False).input_ids:
            # A run of spaces is as likely with its pieces in another order; the two take different ones by rounding.
            assert sorted(fast(line, add_special_tokens=False).input_ids) == sorted(ids)
        if remap.keys() >= {*before.EncodeAsIds(line)}:
            assert ids == [remap[token] for token in before.EncodeAsIds(line)]
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    other = Vocabulary(tuple(range(200)), 4002)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(PruningError, match="added token"):
        rewrite_files(tmp_path, other)
    (note,) = rewrite_files(tmp_path, Vocabulary(tuple(range(4002)), 4002))
    assert "tokenizer.model is left out" in note and not (tmp_path / "tokenizer.model").exists()


def test_ids_are_renumbered_wherever_a_config_names_them() -> None:
    vocabulary = Vocabulary((0, 2, 5, 7, 9), 10)
    config = {
        "vocab_size": 10,
        "bos_token_id": 2,
        "eos_token_id": [5, 9],
        "pad_token_id": None,
        "image_token_index": 7,
        "padded_vocab_size": 10,
        "text_config": {"vocab_size": 10, "decoder_start_token_id": 9},
        "bad_words_ids": [[2, 5], [7]],
        "type_vocab_size": 2,
        "hidden_size": 10,
    }
    assert renumber_config(
        config, vocabulary, loaded={"sep_token_id": 9, "bos_token_id": 0, "mask_token_id": None}
    ) == {
        "vocab_size": 5,
        "bos_token_id": 1,
        "eos_token_id": [2, 4],
        "pad_token_id": None,
        "image_token_index": 3,
        "padded_vocab_size": 5,
        "text_config": {"vocab_size": 5, "decoder_start_token_id": 4},
        "bad_words_ids": [[1, 2], [3]],
        "type_vocab_size": 2,
        "hidden_size": 10,
        "sep_token_id": 4,
    }
    assert renumber_config({"pad_token_id": -1, "eos_token_id": 50256}, vocabulary) == {
        "pad_token_id": -1,
        "eos_token_id": 50256,
    }


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"forced_decoder_ids": [[1, 2]]}, "forced_decoder_ids"),
        ({"sequence_bias": [[[1], 2.0]]}, "sequence_bias"),
        ({"lang_to_id": {"<en>": 4}}, "lang_to_id"),
        ({"audio_config": {"vocab_size": 7}}, "audio_config.vocab_size"),
        ({"vocab_size_per_layer_input": 10}, "vocab_size_per_layer_input"),
        ({"token_id_map": {"a": 1}}, "token_id_map"),
        ({"eos_token_id": "<s>"}, "eos_token_id"),
        ({"eos_token_id": 1}, "eos_token_id"),
    ],
)
def test_a_key_that_cannot_be_renumbered_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(PruningError, match=key) as caught:
        renumber_config(config, Vocabulary((0, 2), 10))
    assert caught.value.code == ErrorCode.VOCABULARY_UNSUPPORTED


def test_what_a_model_names_is_found_and_renumbered_in_memory() -> None:
    model = make_model("llama", pad_token_id=7, eos_token_id=[3, 380], bos_token_id=5)
    model.generation_config = GenerationConfig(eos_token_id=[3, 380], suppress_tokens=[11])
    assert named_tokens(model) == {3, 5, 7, 11, 380}
    cut_model(model, Vocabulary((3, 5, 7, 11, 380), 384))
    assert model.config.vocab_size == 5 and model.vocab_size == 5
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [0, 4], 2)
    assert model.generation_config.eos_token_id == [0, 4] and model.generation_config.suppress_tokens == [3]
    assert model.get_input_embeddings().padding_idx == 2
    with pytest.raises(PruningError, match="has 5 rows"):
        cut_model(model, Vocabulary((0, 1), 384))


def test_other_tokenizers_are_refused() -> None:
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(PruningError, match="WordPiece"):
        choose(PreTrainedTokenizerFast(tokenizer_object=pieces), ["a"], 2)
    with pytest.raises(PruningError, match="no texts"):
        choose(source("byte-level"), [""], 5000)
    with pytest.raises(PruningError, match="4002 tokens"):
        choose(source("byte-level"), ["a"], 100)


def test_nats_per_byte_counts_every_token_once_whatever_the_window() -> None:
    tokenizer = source("sentencepiece")
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    text = USED[0][:300]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        log = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    whole = nats_per_byte(model, tokenizer, [text], 512)
    assert whole == pytest.approx(-float(log.sum()) / len(text.encode()), rel=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    uniform = float(torch.tensor(float(len(tokenizer))).log()) * (ids.shape[1] - 1) / len(text.encode())
    for length in (2, 3, 7, 64, 512):
        assert nats_per_byte(model, tokenizer, [text], length) == pytest.approx(uniform, rel=1e-5)
    with pytest.raises(PruningError, match="empty"):
        nats_per_byte(model, tokenizer, [""], 8)
    vocabulary = choice("sentencepiece").vocabulary
    smaller = make_model("llama", vocab_size=vocabulary.rows)
    before = nats_per_byte(smaller, tokenizer, [text], 64)
    cut_model(smaller, vocabulary)
    after = nats_per_byte(smaller, cut("sentencepiece"), [text], 64)
    assert 0 < after < 1.5 * before
