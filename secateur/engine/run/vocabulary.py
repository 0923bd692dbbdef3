"""The choice of a run's vocabulary by the texts that the request names."""

from collections.abc import Sequence

from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.measure.texts import HELD_OUT_SHARE, Windows, source_texts
from secateur.engine.model.decoder import Decoder
from secateur.engine.run.workspace import Workspace
from secateur.engine.structures.vocabulary import Choice, choose, named_tokens

ENOUGH = 500_000
"""Number of tokens of a data set by which a vocabulary is chosen."""


def choose_vocabulary(decoder: Decoder, spec: PruningSpec, workspace: Workspace) -> Choice:
    """Choose the tokens that stay in a model that still has all of them.

    Raises:
        PruningError: ``vocabulary_unsupported``, ``tokenizer_unusable``, ``text_not_found``, ``text_invalid``,
            ``chat_template_missing``, ``hub_unavailable`` (retryable).
    """
    asked = spec.vocabulary
    assert asked is not None
    own = asked.dataset is not None or asked.texts is not None
    calibration = spec.calibration
    texts = source_texts(
        decoder,
        asked if own else calibration,
        ENOUGH if own else calibration.samples * calibration.sequence_length * 8,
        "vocabulary" if own else "calibration",
        workspace.texts_dir,
        workspace.token,
        workspace.allow_paths,
        workspace.uploads_dir,
    )
    assert texts is not None, "a request without any text was refused"
    if not own and spec.evaluation.dataset is None and spec.evaluation.texts is None:
        texts = _beginning(texts, 1 - HELD_OUT_SHARE)
    named = named_tokens(decoder.model)
    return choose(decoder.tokenizer, texts, decoder.shape.vocab_size, named, asked.max_growth, asked.multiple)


def evaluation_texts(decoder: Decoder, evaluation: Windows) -> list[str]:
    """Return the texts of the evaluation windows, by which models with different vocabularies are compared."""
    tokens = evaluation.tokens[:, len(decoder.opening) :]
    texts: list[str] = [decoder.tokenizer.decode(window, clean_up_tokenization_spaces=False) for window in tokens]
    return [text for text in texts if text]


def refuse_tokens(spec: PruningSpec) -> None:
    """Refuse calibration tokens of the caller in a request that changes what tokens mean.

    Raises:
        PruningError: ``invalid_request``.
    """
    if spec.vocabulary is not None:
        raise PruningError(
            ErrorCode.INVALID_REQUEST,
            "Token ids are those of the source, and 'vocabulary' renumbers tokens; allowed: texts.",
            field="data",
        )


def _beginning(texts: Sequence[str], share: float) -> list[str]:
    """Return the first characters of all texts, so that their number is ``share`` of all characters."""
    left, found = int(share * sum(map(len, texts))), []
    for text in texts:
        found.append(text[:left])
        left -= len(found[-1])
    return [text for text in found if text]
