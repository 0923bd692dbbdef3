"""The bodies of the responses of ``/v1/jobs``."""

import datetime as dt
import hashlib
import json
import math
import statistics
import uuid
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from secateur.contract.report import StepKind
from secateur.contract.stages import Stage
from secateur.contract.states import State

PARTS_WITH_TEXTS = ("calibration", "evaluation", "vocabulary")


def without_texts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dumped spec or job request in which a count and a SHA-256 hash stand for each list of texts.

    Texts are long, and they may be confidential.
    """
    shown = {**request}
    for part in PARTS_WITH_TEXTS:
        if shown.get(part) is None:
            continue
        source = shown[part] = {**request[part]}
        texts = source.pop("texts", None)
        if texts is not None:
            digest = hashlib.sha256()
            for piece in json.JSONEncoder().iterencode(texts):  # in one piece, long texts would be copied twice
                digest.update(piece.encode())
            source["texts"] = f"{len(texts)} texts, sha256 {digest.hexdigest()}"
    return shown


class Publication(BaseModel):
    """The repository in which a pruned model is published."""

    repo_id: str
    private: bool


class PlannedTarget(BaseModel):
    """One of the pruned models that a job would make.

    A ratio is null when it is known only after the model is loaded.
    """

    target_ratio: float | None = Field(
        description="The requested ratio, or the ratio that the goal requires; null of a goal with `vocabulary`, until the tokens are chosen."
    )
    nearest_ratio: float | None = Field(description="The ratio that will be reached.")
    repo_id: str | None = Field(description="Where it would be published; null: nowhere.")


class DryRun(BaseModel):
    """The result of a dry run (`validate_only`): what the job would do. No job is created."""

    model_id: str
    revision: str | None = Field(description="The commit that would be used; null for a local model.")
    method: str
    rounds: int
    targets: list[PlannedTarget]
    publish: Publication | None
    memory_bytes: int | None = Field(
        description="What it takes at least on a worker's device; null before sizes are known."
    )
    waiting_for: str | None = Field(
        None,
        description="What the job would wait for; null if a live worker can hold it.",
        examples=["a worker with 80.0 GiB of memory; the live workers offer: 24.0 GiB"],
    )
    shape: dict[str, Any] | None = Field(description="The model's sizes, as `POST /v1/models/inspect` gives them.")


class Progress(BaseModel):
    """The progress of a job."""

    stage: Stage
    step: int = Field(0, description="The step that the stage belongs to; 0 is the baseline, the unpruned model.")
    steps: int = Field(description="Rounds of all targets, and their trainings.")
    share: float = Field(ge=0, le=1, description="Completed share of the whole job.")
    stage_share: float = Field(0.0, ge=0, le=1, description="Completed share of the stage.")
    rate: float | None = Field(None, description="Amount that the stage processes per second.")
    rate_unit: str | None = Field(None, description="`tokens/s` or `bytes/s`.")
    estimated_finish_at: dt.datetime | None = None


class JobError(BaseModel):
    """The reason why the job failed. `code` is stable; `message` says how to resolve the error."""

    code: str = Field(description="A name of `ErrorCode`, see docs/errors.md; older releases stored others.")
    message: str
    retryable: bool
    field: str | None = Field(None, description="The field of the request that is at fault, where one is.")


class JobSummary(BaseModel):
    """The properties of a job that a list of jobs shows."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    key_id: uuid.UUID | None = Field(
        None, description="The API key that created the job; null for callers without the scope `admin`."
    )
    state: State
    derived_from: uuid.UUID | None = Field(
        None, description="The job whose request was changed to make this job; it may be deleted since."
    )
    model_id: str
    method: str
    labels: dict[str, str]
    attempt: int = Field(description="How often a worker has taken the job.")
    failures: int = Field(description="Attempts that failed; the service gives up at a fixed number.")
    pause_requested: bool = Field(description="The job pauses at the end of the step it is in.")
    progress: Progress | None = None
    error: JobError | None = None
    last_error: JobError | None = Field(
        None, description="The error for which a queued job waits until `not_before` for its next attempt."
    )
    not_before: dt.datetime | None = Field(None, description="The earliest time of a queued job's next attempt.")
    result: dict[str, Any] | None = Field(
        None,
        description="On success: repo_id, commit_sha, parameters, perplexity and latency before and after, widths; for a list of target ratios `targets`, with these and `target_ratio` in each.",
    )
    created_at: dt.datetime
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None
    expires_at: dt.datetime | None = Field(
        None,
        description="The time at which the artifacts of a published job, or the checkpoints of a failed or cancelled job, are deleted; null: not before the job is deleted.",
    )


class JobView(JobSummary):
    """A job with its request."""

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
                        "stage": "scoring",
                        "step": 2,
                        "steps": 3,
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

    request: dict[str, Any] = Field(
        description="The request, with defaults filled in and `revision` resolved; `texts` by their count and hash."
    )
    waiting_for: str | None = Field(
        None,
        description="While the job is queued and no live worker can hold it: what it requires, and what the live workers "
        "offer. A change of this field alone does not change the ETag.",
        examples=["a worker with the labels gpu=h100; the live workers offer: 24.0 GiB gpu=a10"],
    )


class JobPage(BaseModel):
    """A page of a list of jobs, newest first."""

    items: list[JobSummary]
    next_page_token: str | None = Field(description="Null on the last page.")


class EventView(BaseModel):
    """An event of a job: a change of state, a completed step, a warning, a retry, or an act of an administrator."""

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
    type: str = Field(description="`state`, `step`, `warning`, `retry`, `admin`.")
    attempt: int
    created_at: dt.datetime
    data: dict[str, Any]


class EventPage(BaseModel):
    """A page of a job's events, oldest first."""

    items: list[EventView]
    next_page_token: str | None = Field(description="Null when there are no more events so far.")


class LogLineView(BaseModel):
    """A line that a process of the job wrote on its worker."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [
                {"attempt": 1, "number": 7, "written_at": "2026-01-01T12:00:02Z", "text": "Loading weights: 100%"}
            ]
        },
    )

    attempt: int
    number: int = Field(description="Number of the line in its attempt, from 1.")
    written_at: dt.datetime = Field(description="By the clock of the worker.")
    text: str = Field(description="Without secrets and paths of the service; a long line is cut off.")


class LogPage(BaseModel):
    """A page of a job's log, oldest first."""

    items: list[LogLineView]
    next_page_token: str | None = Field(description="Null when the job has ended and there are no more lines.")


class StepView(BaseModel):
    """A completed step. Step 0 is the baseline, the measurement of the unpruned model.

    Numbers continue from one target ratio to the next.
    """

    model_config = ConfigDict(from_attributes=True)

    number: int
    attempt: int
    created_at: dt.datetime
    data: dict[str, Any] = Field(
        description="`kind` (`baseline`, `round` or `training`), target ratio, widths by layer, perplexity, loss curve, time, memory."
    )


class StepList(BaseModel):
    """The completed steps of a job, in order."""

    items: list[StepView]


class StepMetrics(BaseModel):
    """The figures of a completed step as one flat row; a figure that the step did not measure is null."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "step": 1,
                    "kind": "round",
                    "attempt": 1,
                    "completed_at": "2026-01-01T12:01:00Z",
                    "target_ratio": 0.2,
                    "planned_ratio": 0.2,
                    "reached_ratio": 0.1998,
                    "perplexity": 21.3,
                    "loss": 3.0587,
                    "parameters": 113_000_000,
                    "seconds": 41.5,
                }
            ]
        }
    )

    step: int = Field(description="Number of the step; 0 is the baseline.")
    kind: StepKind
    attempt: int = Field(description="The attempt that completed the step.")
    completed_at: dt.datetime
    target_ratio: float | None = Field(None, description="The ratio of the target that the step belongs to.")
    planned_ratio: float | None = Field(None, description="The ratio that was planned for the end of the step.")
    reached_ratio: float | None = Field(None, description="The ratio that whole units reach after the step.")
    perplexity: float | None = Field(None, description="On the evaluation text; null also if it is infinite.")
    loss: float | None = Field(None, description="Mean token loss on the evaluation text in nats: ln(perplexity).")
    training_step: int | None = Field(None, description="Optimizer steps of the training so far.")
    training_loss: float | None = Field(None, description="Mean token loss of the last optimizer step in nats.")
    zero_shot_mean: float | None = Field(None, description="Mean score of the zero-shot tasks.")
    parameters: int | None = None
    prunable_parameters: int | None = None
    weights_bytes: int | None = None
    flops: int | None = Field(None, description="Of a prefill of 256 tokens.")
    prefill_ms: float | None = None
    decode_ms_per_token: float | None = None
    tokens_per_second: float | None = Field(None, description="Decoded tokens of all sequences of the batch.")
    energy_joules_per_token: float | None = None
    peak_memory_bytes: int | None = Field(
        None, description="While the latency is measured: the device's peak on CUDA, the process's peak on a CPU."
    )
    seconds: float | None = Field(None, description="Duration of the step, with measuring.")

    @classmethod
    def of_step(cls, number: int, attempt: int, completed_at: dt.datetime, data: Mapping[str, Any]) -> Self:
        """Return the figures of a stored step; ``data`` is that of :meth:`secateur.contract.report.Step.as_dict`."""
        ratio, training, latency = (data.get(part) or {} for part in ("ratio", "training", "latency"))
        perplexity, losses = data.get("perplexity"), training.get("loss")
        scores = [task["value"] for task in ((data.get("benchmarks") or {}).get("zero_shot") or {}).values()]
        same = ("kind", "target_ratio", "parameters", "prunable_parameters", "weights_bytes", "flops", "seconds")
        timed = (
            "prefill_ms",
            "decode_ms_per_token",
            "tokens_per_second",
            "energy_joules_per_token",
            "peak_memory_bytes",
        )
        return cls(
            step=number,
            attempt=attempt,
            completed_at=completed_at,
            planned_ratio=ratio.get("target"),
            reached_ratio=ratio.get("reached"),
            perplexity=perplexity,
            loss=math.log(perplexity) if perplexity else None,
            training_step=training.get("step"),
            training_loss=losses[-1] if losses else None,
            zero_shot_mean=statistics.fmean(scores) if scores else None,
            **{name: data[name] for name in same if name in data},
            **{name: latency[name] for name in timed if name in latency},
        )


class MetricsList(BaseModel):
    """The figures of the completed steps of a job, in order."""

    items: list[StepMetrics]


class Artifact(BaseModel):
    """A file of the pruned model."""

    name: str = Field(
        description="Name of the file; it begins with the folder `ratio-…/` if the request has a list of target ratios.",
        examples=["config.json"],
    )
    size: int = Field(description="Bytes.", examples=[1024])
    sha256: str = Field(description="The SHA-256 hash of the content, in hexadecimal.")
    url: str = Field(examples=["/v1/jobs/0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10/artifacts/config.json"])


class ArtifactList(BaseModel):
    """The files of the pruned model, sorted by name."""

    items: list[Artifact]
