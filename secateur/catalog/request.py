"""The job request: a model, how to prune the model, and what the service does with the result."""

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from secateur.catalog.methods import METHODS
from secateur.catalog.sources import LOCAL_NAME, LOCAL_PREFIX
from secateur.catalog.spec import PruningSpec
from secateur.contract.keys import HubTokenText

LONGEST_RUN = 30 * 86_400
LABEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"
_HTTP_URL = TypeAdapter(AnyHttpUrl)


def check_repo_id(repo_id: str) -> str:
    """Return ``repo_id`` if it is a valid Hub repository name with a namespace.

    Raises:
        ValueError: The name is not a valid repository id, or has no namespace.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"no repository id: {error}") from None
    if "/" not in repo_id:
        raise ValueError("a repository id has a namespace: 'org/name'")
    return repo_id


def check_model_id(model_id: str) -> str:
    """Return ``model_id`` if it is a Hub id or ``local:NAME``.

    Raises:
        ValueError: The id is neither.
    """
    if model_id.startswith(LOCAL_PREFIX):
        if not LOCAL_NAME.fullmatch(model_id.removeprefix(LOCAL_PREFIX)):
            raise ValueError("a local model is 'local:NAME', NAME of letters, digits, '.', '_' and '-'")
        return model_id
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise ValueError(f"neither a Hub id ('org/name') nor 'local:NAME': {error}") from None
    return model_id


def check_relative_path(path: str) -> str:
    """Return ``path`` if it does not lead out of the repository.

    Raises:
        ValueError: The path is absolute, or contains ``..``.
    """
    if ".." in path.split("/") or path.startswith("/"):
        raise ValueError("a path within the repository")
    return path


def check_webhook_url(url: str) -> str:
    """Return ``url`` if it is an absolute http or https URL without a user name and a password.

    Raises:
        ValueError: The URL is not of this form.
    """
    parsed = _HTTP_URL.validate_python(url)
    if parsed.username is not None or parsed.password is not None:
        raise ValueError("a URL without user name and password; the signature tells who calls")
    return url


ModelId = Annotated[str, StringConstraints(max_length=200), AfterValidator(check_model_id)]
Revision = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,254}$"), AfterValidator(check_relative_path)
]
GgufFile = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9._/ -]{1,250}\.gguf$"), AfterValidator(check_relative_path)
]
LabelName = Annotated[str, StringConstraints(pattern=LABEL_NAME)]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,255}$")]

OwnHubToken = Annotated[
    HubTokenText | None,
    Field(
        min_length=1,
        max_length=512,
        description="Read the model, and publish, with this token instead of the API key's or the service's. It is encrypted "
        "while the job needs it, and never shown.",
    ),
]

Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=32)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Publish(_Request):
    """The repository that the pruned model is published to."""

    repo_id: Annotated[str, StringConstraints(max_length=200), AfterValidator(check_repo_id)] = Field(
        description="Repository; created if it does not exist. If it exists, all its files are replaced, in one commit. With a list of target ratios, there is one for each: `org/name-20` for 0.2, `org/name-12_5` for 0.125.",
        examples=["org/name"],
    )
    private: bool = Field(True, description="Whether a repository that the job creates is private.")


class LabelChange(_Request):
    """The request to change the labels of a job."""

    labels: Labels = Field(description="All labels that the job has afterwards.")


class Requirements(_Request):
    """What a worker must offer to take the job."""

    labels: Labels = Field({}, description="Labels that the worker must have.", examples=[{"gpu": "h100"}])
    memory_bytes: int | None = Field(
        None,
        ge=1,
        lt=2**63,
        description="Memory that the worker's device must have; unset: the service's estimate, which a dry run returns. "
        "A job with a value here is never refused as too large for the live workers: it waits for a larger one.",
    )


class ModelRef(_Request):
    """A model, and how to read the model."""

    model_id: ModelId = Field(
        description="A Hub id, or `local:NAME` for a folder of the service's models folder.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    revision: Revision | None = Field(
        None, description="Branch, tag or commit on the Hub; a job keeps the commit that it was when the job was made."
    )
    gguf_file: GgufFile | None = Field(None, description="Read the weights from this GGUF file of the model.")
    hub_token: OwnHubToken = None


class JobRequest(ModelRef, PruningSpec):
    """A request to prune a model.

    `model_id`, `method` and either `target_ratio` or `goal` are required; the other fields have defaults. A request with
    `from` takes the fields of an earlier job instead (`DerivedRequest`).

    If `target_ratio` is a list of ratios, the report is `{"targets": [...]}`, with the report of one ratio in each
    item, and the result has the same form. The artifacts of each ratio are in a folder such as `ratio-0.2/`.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model_id": "HuggingFaceTB/SmolLM2-135M", "target_ratio": 0.2, "method": "piem-lsps", "rounds": 3},
                {
                    "model_id": "HuggingFaceTB/SmolLM2-135M",
                    "revision": "main",
                    "target_ratio": 0.5,
                    "method": "magnitude",
                    "seed": 7,
                    "calibration": {"dataset": "wikitext2", "samples": 64, "sequence_length": 512},
                    "evaluation": {"dataset": "wikitext2", "latency": False},
                    "publish": {"repo_id": "org/smollm2-half", "private": True},
                    "labels": {"team": "nlp"},
                    "priority": 5,
                    "requirements": {"labels": {"gpu": "h100"}},
                    "max_runtime_seconds": 7200,
                },
                {
                    "model_id": "HuggingFaceTB/SmolLM2-135M",
                    "target_ratio": [0.2, 0.3, 0.5],
                    "method": "piem-lsps",
                    "publish": {"repo_id": "org/smollm2"},
                },
                {
                    "model_id": "HuggingFaceTB/SmolLM2-135M",
                    "goal": {"parameters": 110e6},
                    "method": "flap",
                    "recovery": {"training": {"kind": "lora", "epochs": 1, "rank": 16}},
                },
            ]
        }
    )

    publish: Publish | None = Field(
        None,
        description="Unset: the files are kept as artifacts; a service that publishes to a folder chooses a name there.",
    )
    webhook_url: Annotated[str, StringConstraints(max_length=2048), AfterValidator(check_webhook_url)] | None = Field(
        None,
        description="Gets a signed POST (Standard Webhooks) when the job ends. At a public address, or one that the operator allows.",
        examples=["https://example.org/hook"],
    )
    labels: Labels = Field({}, description="Names and values to find jobs by.")
    priority: int = Field(
        0, ge=-10, le=10, description="Of the jobs of one API key, those with a higher priority run first."
    )
    requirements: Requirements = Field(Requirements(), description="What a worker must offer to take the job.")
    max_runtime_seconds: float | None = Field(
        None, gt=0, le=LONGEST_RUN, description="Fail the job after this long in one run; unset: no limit."
    )
    keep_steps: bool = Field(
        False,
        description="Keep the checkpoint of every completed step, while the API key may store as much, so that "
        "`POST /v1/jobs/{job_id}/steps/{number}/publish` can publish the step after the job has ended.",
    )

    @field_validator("keep_steps")
    @classmethod
    def _has_steps(cls, keep_steps: bool, info: ValidationInfo) -> bool:
        method = info.data.get("method")
        if keep_steps and method is not None and METHODS[method].dynamic:
            raise ValueError(f"'{method}' has one step only, which is the job's result; allowed: false")
        return keep_steps


class DerivedRequest(BaseModel):
    """A request for a job like an earlier job, with changes.

    All fields of `JobRequest` are allowed beside `from`. They are a JSON Merge Patch (RFC 7386) of the earlier job's
    request: a field that is left out keeps its value, `null` gives a field its default, objects are merged field by
    field, and other values and lists are replaced. `null` for a name that the earlier request does not have is refused.

    A `target_ratio` replaces a `goal` and the reverse. Another `model_id` resets `revision` and `gguf_file`. The earlier
    job's Hub token is not taken over, nor is a repository name that the service chose.
    """

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        serialize_by_alias=True,
        json_schema_extra={
            "examples": [
                {"from": "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10", "target_ratio": 0.3},
                {
                    "from": "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10",
                    "method": "flap",
                    "rounds": None,
                    "labels": {"team": "nlp"},
                    "publish": {"repo_id": "org/smollm2-flap"},
                },
            ]
        },
    )

    from_job: uuid.UUID = Field(alias="from", description="The earlier job; the API key must see it.")
    hub_token: OwnHubToken = None

    @property
    def changes(self) -> Mapping[str, Any]:
        """The changes to the earlier job's request, as they were sent."""
        return self.model_extra or {}


class StepPublication(_Request):
    """The request to make a job that publishes a completed step of another job."""

    publish: Publish | None = Field(None, description="As in the request of a job.")
    hub_token: HubTokenText | None = Field(
        None, min_length=1, max_length=512, description="As in the request of a job; the other job's token is not used."
    )
