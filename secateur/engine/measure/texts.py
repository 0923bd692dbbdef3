"""Conversion of texts to windows of tokens, for calibration and for evaluation."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from secateur.catalog.memory import BATCH_TOKENS
from secateur.catalog.names import did_you_mean
from secateur.catalog.sources import LOCAL_NAME, LOCAL_PREFIX, UPLOAD_PREFIX
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec, TextSource, VocabularySettings
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import Text
from secateur.engine.measure.data import chat_texts
from secateur.engine.model.decoder import Decoder
from secateur.engine.time_limit import encode

HELD_OUT_SHARE = 0.2
EVALUATION_SEED_OFFSET = 1_000_003
SAMPLING_BATCH = 16
CHARACTERS_PER_TOKEN = 6
"""Number of characters that are read for a token; a token has about four."""

# name -> (Hub data set, configuration, text column, calibration split, evaluation split)
DATASETS: dict[str, tuple[str, str | None, str, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "train", "validation"),
    "c4": ("allenai/c4", "en", "text", "train", "validation"),
}
REVISIONS = {"ptb": "refs/convert/parquet"}
"""Revisions of data sets whose main branch is a loading script, which ``datasets`` no longer runs."""
WHOLE = 65_536
"""Number of windows of a text when the request sets no limit."""
SAMPLED = "sampled from the model"
TOO_SHORT = {"calibration": ErrorCode.CALIBRATION_TOO_SHORT, "evaluation": ErrorCode.EVALUATION_TOO_SHORT}


@dataclass(frozen=True)
class Windows:
    """``tokens`` ``[windows, length]`` on the model's device, and their source, for the report."""

    tokens: Tensor
    source: str

    def describe(self) -> Text:
        """Return the report's description of the windows."""
        windows, length = self.tokens.shape
        return Text(source=self.source, windows=windows, sequence_length=length, tokens=windows * length)


def batch_windows(tokens: Tensor) -> int:
    """Return the number of windows of ``tokens`` ``[windows, length]`` in one forward or backward pass."""
    return max(1, BATCH_TOKENS // tokens.shape[1])


def read_windows(
    decoder: Decoder,
    calibration: Calibration,
    evaluation: Evaluation,
    seed: int,
    texts_dir: Path | None,
    token: str | None,
    progress: Callable[[float], None],
    allow_paths: bool = False,
    given: Tensor | None = None,
    uploads_dir: Path | None = None,
) -> tuple[Windows, Windows]:
    """Read the calibration and evaluation windows, which are disjoint unless the request names one text for both.

    ``given`` are the caller's own calibration tokens ``[windows, length]``, which are used unchanged in place of a
    text.

    Every window begins with the model's opening (:attr:`Decoder.opening`), followed by text.

    Calibration uses windows at random places of its text (by ``seed``); evaluation uses the first windows of its text.
    Without an evaluation text, the last fifth of the calibration text is held out for evaluation if it is long enough
    for one window. Without any text, the windows of both are sampled from the model (self-generated calibration data,
    Ji et al. 2024, "Beware of Calibration Data").

    Raises:
        PruningError: ``calibration_too_short``, ``evaluation_too_short``, ``text_not_found``, ``text_invalid``,
            ``chat_template_missing``, ``tokenizer_mismatch``, ``tokenizer_unusable``, ``hub_unavailable`` (retryable).
    """
    if given is not None:
        return _given_windows(
            decoder, given, calibration, evaluation, seed, texts_dir, token, progress, allow_paths, uploads_dir
        )
    limit = decoder.shape.max_positions
    lengths = min(calibration.sequence_length, limit), min(evaluation.sequence_length, limit)
    stream = _stream(
        decoder,
        calibration,
        calibration.samples * lengths[0] * 8,
        "calibration",
        texts_dir,
        token,
        allow_paths,
        uploads_dir,
    )
    held_out = _stream(
        decoder, evaluation, evaluation.samples * lengths[1], "evaluation", texts_dir, token, allow_paths, uploads_dir
    )
    if stream is not None and held_out is None and len(stream) * HELD_OUT_SHARE >= lengths[1]:
        boundary = int(len(stream) * (1 - HELD_OUT_SHARE))
        stream, held_out = stream[:boundary], stream[boundary:]
        evaluation_source = f"held out of {describe(calibration)}"
    else:
        evaluation_source = describe(evaluation)

    if stream is None:
        tokens = sample_windows(decoder, calibration.samples, lengths[0], seed, lambda share: progress(share / 2))
    else:
        windows = _cut(decoder, stream, lengths[0], "calibration")
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: calibration.samples]
        tokens = windows[chosen.sort().values]
    if held_out is None:
        evaluation_tokens = sample_windows(
            decoder,
            evaluation.samples,
            lengths[1],
            seed + EVALUATION_SEED_OFFSET,
            lambda share: progress(0.5 + share / 2),
        )
    else:
        evaluation_tokens = _cut(decoder, held_out, lengths[1], "evaluation")[: evaluation.samples]
    progress(1.0)
    device = decoder.device
    return (
        Windows(tokens.to(device), describe(calibration)),
        Windows(evaluation_tokens.to(device), evaluation_source),
    )


def _given_windows(
    decoder: Decoder,
    given: Tensor,
    calibration: Calibration,
    evaluation: Evaluation,
    seed: int,
    texts_dir: Path | None,
    token: str | None,
    progress: Callable[[float], None],
    allow_paths: bool,
    uploads_dir: Path | None,
) -> tuple[Windows, Windows]:
    """Read the windows as :func:`read_windows` does, with the caller's own calibration tokens.

    Without an evaluation text, the last fifth of the tokens is held out for evaluation.
    """
    tokens = given[:, : decoder.shape.max_positions].to(decoder.device)
    _check_ids(decoder, int(tokens.max()))
    source = f"{len(tokens)} windows of the caller"
    length = min(evaluation.sequence_length, decoder.shape.max_positions)
    stream = _stream(
        decoder, evaluation, evaluation.samples * length, "evaluation", texts_dir, token, allow_paths, uploads_dir
    )
    if stream is not None:
        held_out = Windows(
            _cut(decoder, stream, length, "evaluation")[: evaluation.samples].to(decoder.device), describe(evaluation)
        )
    else:
        count = max(round(len(tokens) * HELD_OUT_SHARE), 1)
        if len(tokens) <= count:
            raise PruningError(
                ErrorCode.CALIBRATION_TOO_SHORT,
                "One window of tokens cannot be both calibrated and evaluated on. Give more windows, or an evaluation text.",
                field="data",
            )
        held_out = Windows(tokens[-count:][: evaluation.samples], f"held out of {source}")
        tokens = tokens[:-count]
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[: calibration.samples]
    progress(1.0)
    return Windows(tokens[chosen.sort().values.to(tokens.device)], source), held_out


def read_texts(
    decoder: Decoder,
    evaluation: Evaluation,
    texts_dir: Path | None,
    token: str | None,
    allow_paths: bool = False,
    uploads_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Return the windows ``[windows, length]`` of each text of ``evaluation.perplexity``.

    The windows follow one after the other; there are ``limit`` of them, or all without a limit. The protocol is
    LLM-Pruner's (Ma et al. 2023), which SlimLLM follows: the rows are joined by blank lines and cut into windows of 128
    tokens.

    Raises:
        PruningError: the errors of :func:`read_windows`.
    """
    length = min(evaluation.perplexity_length, decoder.shape.max_positions)
    found = {}
    for name in evaluation.perplexity:
        most = evaluation.limit or WHOLE
        source = TextSource(dataset=name, samples=most, sequence_length=length)
        stream = _stream(decoder, source, most * length, "evaluation", texts_dir, token, allow_paths, uploads_dir)
        assert stream is not None, "it has a data set"
        found[name] = _cut(decoder, stream, length, "evaluation")[:most].to(decoder.device)
    return found


def describe(source: TextSource) -> str:
    """Return a description of the text source for the report and the model card."""
    if source.dataset is not None:
        return Path(source.dataset).name if Path(source.dataset).is_file() else source.dataset
    return f"{len(source.texts)} texts of the request" if source.texts is not None else SAMPLED


def _stream(
    decoder: Decoder,
    source: TextSource,
    enough: int,
    purpose: str,
    texts_dir: Path | None,
    token: str | None,
    allow_paths: bool,
    uploads_dir: Path | None,
) -> Tensor | None:
    """Return the tokens of the source in one row, or ``None`` when the source names no text.

    The row has at least about ``enough`` tokens if the source has as many.
    """
    texts = source_texts(decoder, source, enough, purpose, texts_dir, token, allow_paths, uploads_dir)
    if texts is None:
        return None
    ids = encode(decoder.tokenizer, "\n\n".join(texts), add_special_tokens=False, verbose=False)
    if ids:
        _check_ids(decoder, max(ids))
    return torch.tensor(ids, dtype=torch.long)


def source_texts(
    decoder: Decoder,
    source: TextSource | VocabularySettings,
    enough: int,
    purpose: str,
    texts_dir: Path | None,
    token: str | None,
    allow_paths: bool,
    uploads_dir: Path | None,
) -> list[str] | None:
    """Return the texts of the source, or ``None`` when the source names no text.

    Of a data set, about so many texts are read as have ``enough`` tokens. ``purpose`` is the request's field.

    Raises:
        PruningError: ``text_not_found``, ``text_invalid``, ``chat_template_missing``, ``hub_unavailable`` (retryable).
    """
    if source.texts is not None:
        return list(source.texts)
    if source.dataset is None:
        return None
    if source.dataset.startswith(UPLOAD_PREFIX):
        return _read_upload(decoder, source.dataset, purpose, enough, uploads_dir)
    if source.dataset.startswith(LOCAL_PREFIX) or (allow_paths and Path(source.dataset).is_file()):
        return [_read_file(source.dataset, purpose, texts_dir)]
    return _read_dataset(source.dataset, purpose, enough, token)


def _check_ids(decoder: Decoder, largest: int) -> None:
    if largest >= decoder.shape.vocab_size:
        raise PruningError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"The tokenizer makes token {largest}, but the model has {decoder.shape.vocab_size} embeddings.",
            field="model_id",
        )


def _cut(decoder: Decoder, stream: Tensor, length: int, purpose: str) -> Tensor:
    """Cut ``stream`` into windows ``[windows, length]``, each of which begins with the model's opening."""
    own = length - len(decoder.opening)
    count = len(stream) // own
    if count == 0:
        raise PruningError(
            TOO_SHORT[purpose],
            f"The {purpose} text has {len(stream)} tokens; one window needs {own}. Give more text, or a smaller "
            f"'{purpose}.sequence_length'.",
            field=purpose,
        )
    return torch.cat([decoder.opening.expand(count, -1), stream[: count * own].view(count, own)], 1)


def refuse_uploads(spec: PruningSpec) -> None:
    """Refuse a request that names uploaded data sets, where there are none.

    Raises:
        PruningError: ``text_not_found``.
    """
    for field, upload in spec.uploads().items():
        raise PruningError(
            ErrorCode.TEXT_NOT_FOUND,
            f"'{UPLOAD_PREFIX}{upload}' is a data set of a service. Here, give texts, the path of a file or a data set of the Hub.",
            field=field,
        )


def _read_upload(decoder: Decoder, name: str, purpose: str, enough: int, uploads_dir: Path | None) -> list[str]:
    """Read an uploaded data set from its beginning until there are about ``enough`` tokens; render chats as texts."""
    assert uploads_dir is not None, "refuse_uploads has refused it"
    path, field = uploads_dir / name.removeprefix(UPLOAD_PREFIX), f"{purpose}.dataset"
    characters = enough * CHARACTERS_PER_TOKEN
    if (plain := path.with_suffix(".txt")).is_file():
        with plain.open(encoding="utf-8-sig") as file:
            return [file.read(characters)]
    rows: list[dict[str, Any]] = []
    with path.with_suffix(".jsonl").open("rb") as lines:
        for line in lines:
            rows.append(json.loads(line.decode("utf-8-sig")))
            characters -= _characters(rows[-1])
            if characters <= 0:
                break
    if "messages" in rows[0]:
        return chat_texts([row["messages"] for row in rows], decoder.tokenizer, field)
    return [row["text"] for row in rows]


def _characters(row: dict[str, Any]) -> int:
    """Return the number of characters of the texts in a line of a data set."""
    if "text" in row:
        return len(row["text"])
    return sum(len(message["content"]) for message in row["messages"])


def _read_file(name: str, purpose: str, texts_dir: Path | None) -> str:
    path = Path(name)
    if name.startswith(LOCAL_PREFIX):
        plain = name.removeprefix(LOCAL_PREFIX)
        if texts_dir is None or not LOCAL_NAME.fullmatch(plain):
            raise PruningError(ErrorCode.TEXT_NOT_FOUND, f"There is no text '{name}'.", field=f"{purpose}.dataset")
        path = texts_dir / plain
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(file.name for file in path.parent.glob("*"))
        raise PruningError(
            ErrorCode.TEXT_NOT_FOUND,
            f"There is no text '{name}'{did_you_mean(path.name, known)}",
            field=f"{purpose}.dataset",
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise PruningError(
            ErrorCode.TEXT_INVALID, f"'{name}' is no UTF-8 text: {error}", field=f"{purpose}.dataset"
        ) from None


def _read_dataset(name: str, purpose: str, enough: int, token: str | None) -> list[str]:
    """Read rows of a Hub data set until they hold about ``enough`` tokens."""
    import datasets

    hub_id, _, configuration = name.partition(":")
    path, config, column, calibration_split, evaluation_split = DATASETS.get(
        name, (hub_id, configuration or None, "text", "train", "test")
    )
    if Path(path).suffix == ".txt" or path.startswith(("/", ".")):
        raise PruningError(ErrorCode.TEXT_NOT_FOUND, f"There is no file '{name}'.", field=f"{purpose}.dataset")
    if Path(path).exists():  # load_dataset would read a local folder of that name
        raise PruningError(ErrorCode.TEXT_INVALID, f"'{name}' is no data set on the Hub.", field=f"{purpose}.dataset")
    split = evaluation_split if purpose == "evaluation" else calibration_split
    try:
        rows = datasets.load_dataset(
            path, config, split=split, streaming=True, token=token, revision=REVISIONS.get(name)
        )
        texts: list[str] = []
        size = 0
        for row in rows:
            if column not in row:
                raise PruningError(
                    ErrorCode.TEXT_INVALID,
                    f"'{name}' has no column '{column}', but {', '.join(row)}.",
                    field=f"{purpose}.dataset",
                )
            texts.append(row[column])
            size += len(row[column])
            if size >= enough * CHARACTERS_PER_TOKEN:
                break
        return texts
    except PruningError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise PruningError(
            ErrorCode.TEXT_NOT_FOUND, f"There is no data set '{name}': {error}", field=f"{purpose}.dataset"
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PruningError(
            ErrorCode.TEXT_INVALID, f"'{name}' cannot be read: {error}", field=f"{purpose}.dataset"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise PruningError(
            ErrorCode.HUB_UNAVAILABLE, f"The data set '{name}' could not be fetched: {type(error).__name__}."
        ) from error


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Give the model an empty generation config while the context lasts.

    ``generate`` fills unset options (for example a repetition penalty) from the model's own generation config.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def sample_windows(decoder: Decoder, windows: int, length: int, seed: int, progress: Callable[[float], None]) -> Tensor:
    """Sample texts ``[windows, length]`` from the model itself, from the first token on, at temperature 1.

    Sampling is seeded and leaves the caller's random state unchanged. Calibration on these texts needs no data.
    """
    model, tokenizer = decoder.model, decoder.tokenizer
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    opening = decoder.opening.tolist()
    own = length - len(opening)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=own,
        max_new_tokens=own,
        pad_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = []
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), plain_generation(model):
        torch.manual_seed(seed)
        for first in range(0, windows, SAMPLING_BATCH):
            prompt = torch.tensor([opening or [start]], device=decoder.device)
            prompt = prompt.expand(min(SAMPLING_BATCH, windows - first), -1)
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            rows.append(output[:, -length:].cpu())
            progress(min(first + SAMPLING_BATCH, windows) / windows)
    return torch.cat(rows)
