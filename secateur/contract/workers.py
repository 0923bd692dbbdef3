"""The bodies of the requests and responses of ``/v1/workers``."""

import datetime as dt
import uuid
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Drain(StrEnum):
    """How a worker is drained: it takes no new job, and it finishes its job or releases it at the end of its step."""

    FINISH = "finish"
    RELEASE = "release"


class DrainRequest(BaseModel):
    """The request to drain a worker."""

    model_config = ConfigDict(extra="forbid")

    now: bool = Field(
        False, description="Release the worker's job at the end of its step; another worker continues it from there."
    )


class WorkerView(BaseModel):
    """A worker, what it offers, and the job that it works on."""

    name: str = Field(description="Host and process id.", examples=["gpu-host-3:4711"])
    live: bool = Field(description="Whether the worker sends heartbeats.")
    drain: Drain | None = Field(description="Null: the worker takes jobs.")
    job_id: uuid.UUID | None = Field(description="The job that the worker works on.")
    device: str | None = Field(examples=["cuda"])
    memory_bytes: int | None = Field(description="Memory of the device; null: not known.")
    host_memory_bytes: int | None = Field(description="Memory of the machine or container; null: not known.")
    disk_free_bytes: int | None
    labels: dict[str, str] = Field(description="From `SECATEUR_WORKER_LABELS`.")
    started_at: dt.datetime
    last_seen_at: dt.datetime


class WorkerList(BaseModel):
    """The workers that sent a heartbeat in the last 24 hours, sorted by name."""

    items: list[WorkerView]
