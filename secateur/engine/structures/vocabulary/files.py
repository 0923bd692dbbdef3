"""The files of a tokenizer, and the loaded tokenizer, with only the kept tokens."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateur.engine.structures.vocabulary.description import cut_description, describe
from secateur.engine.structures.vocabulary.kept import Vocabulary
from secateur.engine.structures.vocabulary.names import renumber_config
from secateur.engine.structures.vocabulary.pieces import cut_ids, read_pieces, stays
from secateur.engine.time_limit import with_tokenizer

DESCRIPTION = "tokenizer.json"
IDS = ("vocab.json", "added_tokens.json")
"""Files of token ids by text."""
SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """Return a tokenizer with only the kept tokens, under their new ids; ``tokenizer`` is not changed.

    Raises:
        PruningError: ``vocabulary_unsupported``, ``tokenizer_unusable``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        _write(folder / DESCRIPTION, describe(tokenizer))
        rewrite_files(folder, vocabulary)
        cut: PreTrainedTokenizerBase = with_tokenizer(
            0, lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        )
    cut.name_or_path = tokenizer.name_or_path
    return cut


def rewrite_files(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Cut and renumber the tokenizer's files in ``folder``, which are those of the source, and ``generation_config.json``.

    ``tokenizer.json`` must be there. The model's ``config.json`` is left to :func:`renumber_config`, and files that name
    tokens by their texts alone stay as they are. A SentencePiece model whose pieces are not numbered as in
    ``tokenizer.json`` is deleted, as the latter is enough; the list that is returned says so, in whole sentences.

    Raises:
        PruningError: ``vocabulary_unsupported``; some files may then be rewritten.
    """
    source = _read(folder / DESCRIPTION)
    pieces = read_pieces(source)
    cut = cut_description(source, pieces, vocabulary)
    _write(folder / DESCRIPTION, cut)
    for name in IDS:
        if (path := folder / name).is_file():
            _write(path, cut_ids(_read(path), vocabulary))
    if (path := folder / "merges.txt").is_file():
        kept = cut_ids(pieces.ids, vocabulary)
        lines = path.read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line.startswith("#version") or (line.count(" ") == 1 and stays(line, kept))]
        path.write_text("\n".join(merges) + "\n", encoding="utf-8")
    if (path := folder / "tokenizer_config.json").is_file():
        config = renumber_config(_read(path), vocabulary)
        tokens = config.get("added_tokens_decoder", {})
        if tokens:
            config["added_tokens_decoder"] = {
                str(vocabulary.renumber(int(token), "added_tokens_decoder of tokenizer_config.json")): described
                for token, described in tokens.items()
            }
        _write(path, config, indent=2)
    if (path := folder / "generation_config.json").is_file():
        _write(path, renumber_config(_read(path), vocabulary), indent=2)
    ids = {**pieces.ids, **{token["content"]: token["id"] for token in source["added_tokens"]}}
    return [
        f"{name} is left out, because it numbers tokens otherwise than {DESCRIPTION}, which has them all."
        for name in SENTENCEPIECE
        if (folder / name).is_file() and not _cut_sentencepiece(folder / name, ids, vocabulary)
    ]


def _cut_sentencepiece(path: Path, ids: Mapping[str, int], vocabulary: Vocabulary) -> bool:
    """Cut a SentencePiece model and return True, or delete it and return False if its pieces are not numbered as ``ids``.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto describes the file.
    """
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(path.read_bytes())
    if any(ids.get(piece.piece) != index for index, piece in enumerate(model.pieces)):
        path.unlink()
        return False
    kept = [model.pieces[token] for token in vocabulary.kept if token < len(model.pieces)]
    trainer = model.trainer_spec
    for key in ("unk_id", "bos_id", "eos_id", "pad_id"):
        setattr(trainer, key, vocabulary.remap.get(getattr(trainer, key), -1))
    trainer.vocab_size = len(kept)
    del model.pieces[:]
    model.pieces.extend(kept)
    path.write_bytes(model.SerializeToString())
    return True


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
