"""What goes in and out of ``/v1/jobs``."""

import datetime as dt
import uuid
from typing import Annotated, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
)

from app.catalog.sources import LOCAL_NAME, LOCAL_PREFIX
from app.catalog.spec import PruningSpec, without_texts
from app.jobs.states import State

LONGEST_RUN = 30 * 86_400
LABEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"
_HTTP_URL = TypeAdapter(AnyHttpUrl)


def check_repo_id(repo_id: str) -> str:
    """A name that a Hub takes, namespace included."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"no repository id: {error}") from None
    if "/" not in repo_id:
        raise ValueError("a repository id has a namespace: 'org/name'")
    return repo_id


def check_model_id(model_id: str) -> str:
    """A Hub id or ``local:NAME``."""
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
    """No way out of the repository."""
    if ".." in path.split("/") or path.startswith("/"):
        raise ValueError("a path within the repository")
    return path


def check_webhook_url(url: str) -> str:
    """An absolute http or https URL, which names no user."""
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


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Publish(_Request):
    """Where the pruned model goes."""

    repo_id: Annotated[str, StringConstraints(max_length=200), AfterValidator(check_repo_id)] = Field(
        description="Repository; made if it is not there. The files of one that is there are all replaced, in one commit. With a list of target ratios, there is one for each: `org/name-20` for 0.2, `org/name-12_5` for 0.125.",
        examples=["org/name"],
    )
    private: bool = Field(True, description="Of a repository that is made for this job.")


class ModelRef(_Request):
    """A model, and how to read it."""

    model_id: ModelId = Field(
        description="A Hub id, or `local:NAME` for a folder of the service's models folder.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    revision: Revision | None = Field(
        None, description="Branch, tag or commit on the Hub; a job keeps the commit that it was when the job was made."
    )
    gguf_file: GgufFile | None = Field(None, description="Read the weights from this GGUF file of the model.")
    hub_token: SecretStr | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="Read the model, and publish, with this token instead of the API key's or the service's. It is encrypted "
        "while the job needs it, and never shown.",
    )


class JobRequest(ModelRef, PruningSpec):
    """`model_id`, `target_ratio`, `method` and `rounds` are the whole of it; the rest has defaults.

    With a list of ratios in `target_ratio`, the report is `{"targets": [...]}` and so is the result, one of what a single
    ratio gives for each; the artifacts of each are in `ratio-0.2/` and so on.
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
                    "target": {"parameters": 110e6},
                    "method": "flap",
                    "recovery": {"kind": "lora", "epochs": 1, "rank": 16},
                },
            ]
        }
    )

    publish: Publish | None = Field(
        None,
        description="Unset: the files are kept as artifacts; a service that publishes to a folder picks a name there.",
    )
    webhook_url: Annotated[str, StringConstraints(max_length=2048), AfterValidator(check_webhook_url)] | None = Field(
        None,
        description="Gets a signed POST (Standard Webhooks) when the job ends. At a public address, or one that the operator allows.",
        examples=["https://example.org/hook"],
    )
    labels: dict[LabelName, LabelValue] = Field({}, max_length=32, description="Yours, to find jobs by.")
    max_runtime_seconds: float | None = Field(
        None, gt=0, le=LONGEST_RUN, description="Fail the job after this long in one run; unset: no limit."
    )


class PlannedTarget(BaseModel):
    """One of the pruned models that a job would make. Nulls: known only once the model is there."""

    target_ratio: float | None = Field(description="As asked for, or what the size asked for comes to.")
    nearest_ratio: float | None = Field(description="The ratio that will be reached.")
    repo_id: str | None = Field(description="Where it would be published; null: nowhere.")


class Plan(BaseModel):
    """What a job would do: the answer to `validate_only`."""

    model_id: str
    revision: str | None = Field(description="The commit that would be used; null for a local model.")
    method: str
    rounds: int
    targets: list[PlannedTarget]
    publish: Publish | None
    memory_bytes: int | None = Field(
        description="What it takes at least on a worker's device; null before sizes are known."
    )
    shape: dict[str, Any] | None = Field(description="The model's sizes, as `POST /v1/models/inspect` gives them.")


class Progress(BaseModel):
    """How far the job is."""

    stage: str
    round: int = Field(0, description="0 is the measuring of the unpruned model.")
    rounds: int = Field(description="Of all targets, and of training recovery.")
    share: float = Field(ge=0, le=1, description="Of the whole job.")
    stage_share: float = Field(0.0, ge=0, le=1, description="Of the stage.")
    rate: float | None = Field(None, description="What the stage gets through in a second.")
    rate_unit: str | None = Field(None, description="`tokens/s` or `bytes/s`.")
    estimated_finish_at: dt.datetime | None = None


class JobError(BaseModel):
    """Why the job failed. `code` is stable; `message` says what can be done."""

    code: str
    message: str
    retryable: bool
    field: str | None = Field(None, description="The field of the request that is at fault, where one is.")


class JobSummary(BaseModel):
    """A job as a list shows it."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    state: State
    model_id: str
    method: str
    labels: dict[str, str]
    attempt: int = Field(description="How often a worker has taken the job.")
    failures: int = Field(description="Attempts that failed; the service gives up at a fixed number.")
    pause_requested: bool = Field(description="The job pauses at the end of the round it is in.")
    progress: Progress | None = None
    error: JobError | None = None
    result: dict[str, Any] | None = Field(
        None,
        description="On success: repo_id, commit_sha, parameters, perplexity and latency before and after, widths; for a list of target ratios `targets`, with these and `target_ratio` in each.",
    )
    created_at: dt.datetime
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None


class JobView(JobSummary):
    """A job."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [
                {
                    "id": "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10",
                    "state": "running",
                    "model_id": "HuggingFaceTB/SmolLM2-135M",
                    "method": "piem-lsps",
                    "labels": {"team": "nlp"},
                    "attempt": 1,
                    "failures": 0,
                    "pause_requested": False,
                    "progress": {
                        "stage": "score",
                        "round": 2,
                        "rounds": 3,
                        "share": 0.55,
                        "estimated_finish_at": "2026-01-01T12:05:00Z",
                    },
                    "error": None,
                    "result": None,
                    "created_at": "2026-01-01T12:00:00Z",
                    "started_at": "2026-01-01T12:00:01Z",
                    "finished_at": None,
                    "request": {
                        "model_id": "HuggingFaceTB/SmolLM2-135M",
                        "target_ratio": 0.2,
                        "method": "piem-lsps",
                        "rounds": 3,
                        "labels": {"team": "nlp"},
                    },
                }
            ]
        },
    )

    request: Annotated[dict[str, Any], BeforeValidator(without_texts)] = Field(
        description="The request, with defaults filled in and `revision` resolved; `texts` by their count and hash."
    )


class JobPage(BaseModel):
    """Jobs, newest first."""

    items: list[JobSummary]
    next_page_token: str | None = Field(description="Null on the last page.")


class EventView(BaseModel):
    """Something that happened to the job."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [
                {
                    "id": 42,
                    "type": "state",
                    "attempt": 1,
                    "created_at": "2026-01-01T12:00:01Z",
                    "data": {"from": "queued", "to": "running", "trigger": "claim", "error": None},
                }
            ]
        },
    )

    id: int = Field(description="Grows with time; `Last-Event-ID` of the stream.")
    type: str = Field(description="`state`, `round`, `warning`, `retry`.")
    attempt: int
    created_at: dt.datetime
    data: dict[str, Any]


class EventPage(BaseModel):
    """Events, oldest first."""

    items: list[EventView]
    next_page_token: str | None = Field(description="Null when there are no more events so far.")


class RoundView(BaseModel):
    """A completed round. Round 0 is the unpruned model, measured; numbers run on from target to target."""

    model_config = ConfigDict(from_attributes=True)

    number: int
    attempt: int
    created_at: dt.datetime
    data: dict[str, Any] = Field(
        description="`target_ratio`, ratio, widths by layer, perplexity, loss curve, time, memory; of a round of training, `recovery`."
    )


class RoundList(BaseModel):
    """The completed rounds, in order."""

    items: list[RoundView]


class Artifact(BaseModel):
    """A file of the pruned model."""

    name: str = Field(
        description="With its folder `ratio-…/` where a list of target ratios was asked for.", examples=["config.json"]
    )
    size: int = Field(description="Bytes.", examples=[1024])
    url: str = Field(examples=["/v1/jobs/0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10/artifacts/config.json"])


class ArtifactList(BaseModel):
    """The files of the pruned model, by name."""

    items: list[Artifact]


class JobFilter(BaseModel):
    """What a list of jobs can be narrowed by."""

    state: list[State]
    method: str | None
    model_id: str | None
