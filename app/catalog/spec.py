"""What is asked of the engine: the part of a job request that says how to prune, valid by construction."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from app.catalog.methods import METHODS

MAX_RATIO = 0.9

Text = Annotated[str, Field(min_length=1, max_length=1_000_000, pattern=r"^[^\x00]*$")]
"""Postgres stores no NUL."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(_Part):
    """Where text comes from: a named data set, a file, or the texts themselves; neither: sampled from the model."""

    dataset: str | None = Field(
        None,
        max_length=255,
        pattern=r"^[^\x00]+$",
        description="`wikitext2`, `c4`, a Hub data set id (`org/name`, optionally `:config`), or `local:NAME`, a UTF-8 text file in the texts folder.",
        examples=["wikitext2"],
    )
    texts: list[Text] | None = Field(None, min_length=1, max_length=10_000, description="The texts themselves.")
    samples: int = Field(32, ge=1, le=65_536, description="Windows of `sequence_length` tokens, at most.")
    sequence_length: int = Field(256, ge=8, le=8192, description="Tokens a window; capped at what the model takes.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.texts is not None:
            raise ValueError("give either 'dataset' or 'texts', not both")
        size = None if self.texts is None else sum(len(text.encode()) for text in self.texts)
        if size is not None and size < self.sequence_length:  # a token is a byte at least
            raise ValueError(f"the texts have {size} bytes, too short for one window of {self.sequence_length} tokens")
        return self


class Calibration(TextSource):
    """The tokens that scores are taken on. Neither ``dataset`` nor ``texts``: text sampled from the model itself."""


class Evaluation(TextSource):
    """Held-out text for perplexity. Neither ``dataset`` nor ``texts``: the last fifth of the calibration text, which is then
    not calibrated on; or sampled from the model, where there is no such text or too little."""

    latency: bool = Field(True, description="Measure prefill and decode time and peak memory, before and after.")


class Scoring(_Part):
    """PIEM's coefficients (section 3.2): I = λ1·‖W‖1 + λ2·ΔL, S = Ĩ + γ·|∂L/∂u|. Other scorers take none of them."""

    lambda_weight: float = Field(0.1, ge=0, le=100, description="λ1, the weight of the L1 norm.")
    lambda_loss: float = Field(1.0, ge=0, le=100, description="λ2, the weight of the loss change.")
    gamma: float = Field(0.5, ge=0, le=100, description="γ, the weight of the gradient term.")
    shielding: Literal["auto", "exact", "estimate"] = Field(
        "auto",
        description="How a head's ΔL is found: by shielding it in a forward pass, by the estimate from its gate's gradient, or exactly where that is affordable.",
    )


class Allocation(_Part):
    """How the ratio is spread over layers and rounds."""

    schedule: Literal["geometric", "cubic"] = Field(
        "geometric", description="Ratio by round: equal steps of what is left, or cubic (large steps first)."
    )
    width_multiple: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Feed-forward widths are multiples of this; unset: 256 where the model is at least 4096 wide there, else 32.",
    )


class Recovery(_Part):
    """What is done to win back what pruning lost."""

    kind: Literal["none"] = "none"


def without_texts(request: dict[str, Any]) -> dict[str, Any]:
    """A dumped spec or job request whose texts are named by count and hash: they are long, and nobody else's business."""
    shown = {**request}
    for part in {"calibration", "evaluation"} & request.keys():
        source = shown[part] = {**request[part]}
        texts = source.pop("texts", None)
        if texts is not None:
            digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            source["texts"] = f"{len(texts)} texts, sha256 {digest}"
    return shown


class PruningSpec(_Part):
    """How to prune: `target_ratio`, `method` and `rounds` say it; the rest has defaults that suit the method."""

    target_ratio: float = Field(
        gt=0,
        le=MAX_RATIO,
        allow_inf_nan=False,
        strict=True,
        description="Share of the parameters in the decoder blocks' attention and feed-forward weights to remove.",
        examples=[0.2],
    )
    method: str = Field(description="A name of `GET /v1/methods`.", examples=["piem-lsps"])
    rounds: int | None = Field(
        None, strict=True, ge=1, le=64, description="Pruning rounds; unset: the method's default.", examples=[3]
    )
    seed: int = Field(0, ge=0, lt=2**31)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of computing and of the published weights; auto: the source's own."
    )
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    scoring: Scoring = Scoring()
    allocation: Allocation = Allocation()
    recovery: Recovery = Recovery()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"no method '{name}'; allowed: {', '.join(METHODS)}")
        return name

    def published(self) -> dict[str, Any]:
        """The spec as reports and model cards show it, see :func:`without_texts`."""
        return without_texts(self.model_dump(mode="json"))

    @property
    def round_count(self) -> int:
        """``rounds``, or the method's default."""
        return self.rounds or METHODS[self.method].default_rounds
