"""Jobs that keep their steps, and jobs that publish one of them, with the real runner and publisher."""

import asyncio
import json
import time
import uuid
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy.orm import Session
from transformers import LlamaConfig, LlamaForCausalLM

from app.auth.service import Caller
from app.config import Settings
from app.db.session import session_factory
from app.http.problem import Problem
from app.jobs import leases, retention, service
from app.jobs.models import Job
from app.storage.service import delete_requested, tensors_folder
from app.storage.store import open_store
from secateur.catalog.request import JobRequest, Publish, StepPublication
from secateur.contract.keys import USER
from tests.engine.models import SIZES, english, make_tokenizer, save
from tests.workers.conftest import JobHandle, MakeJob
from workers.supervisor import supervise


@pytest.fixture
def request_of_steps(settings: Settings) -> dict[str, Any]:
    """A request of three rounds whose recovery changes tensors, with kept steps."""
    torch.manual_seed(0)
    save(LlamaForCausalLM(LlamaConfig(**SIZES)), make_tokenizer(), settings.models_dir / "tiny")
    text = {"samples": 8, "sequence_length": 32}
    request = JobRequest.model_validate(
        {
            "model_id": "local:tiny",
            "target_ratio": 0.4,
            "method": "magnitude",
            "rounds": 3,
            "calibration": {**text, "texts": english("calibration")},
            "evaluation": {**text, "texts": english("evaluation"), "latency": False, "prompts": []},
            "recovery": {"layerwise": {"kind": "least-squares"}},
            "keep_steps": True,
        }
    )
    return request.model_dump(mode="json", exclude={"hub_token"})


def attempt(job: JobHandle, settings: Settings, session: Session) -> Job:
    """Let a worker make one attempt at the job."""
    claimed = time.monotonic()
    claim = leases.claim(session, job.id, "test", settings.lease_ttl)
    assert claim is not None
    supervise(claim, claimed, settings, session_factory(), lambda: False)
    return job.row


def kept(job: JobHandle) -> list[int]:
    return [step.number for step in job.steps if step.state is not None]


def tensors(job: JobHandle, settings: Settings) -> int:
    """The number of objects of the job's checkpoints."""
    return len(list(open_store(settings).listing(tensors_folder(job.id))))


def publish(job: JobHandle, settings: Settings, number: int, **asked: Any) -> JobHandle:
    caller = Caller(job.row.owner_id, USER)
    asking = service.publish_step(settings, caller, job.id, number, StepPublication(**asked), None)
    return JobHandle(job.session, settings, asyncio.run(asking).id)


def test_a_middle_step_is_published(
    make_job: MakeJob, request_of_steps: dict[str, Any], settings: Settings, session: Session
) -> None:
    job = make_job(**request_of_steps)
    assert attempt(job, settings, session).state == "succeeded"
    delete_requested(session, open_store(settings))
    assert kept(job) == [1, 2, 3] and tensors(job, settings) == 3
    step = job.steps[2]
    made = publish(job, settings, 2, publish=Publish(repo_id="org/second"))
    assert made.row.request["resume_from"] == {"job": str(job.id), "step": 2}
    assert (made.row.owner_id, kept(made)) == (job.row.owner_id, [2])
    done = attempt(made, settings, session)
    assert done.state == "succeeded", done.error
    report = done.report
    assert report is not None and report["widths"]["after"] == step.data["widths"] != job.steps[3].data["widths"]
    assert report["perplexity"]["after"] == pytest.approx(step.data["perplexity"], rel=1e-5)
    assert (report["rounds"], [each["number"] for each in report["steps"]]) == (2, [1, 2])
    assert [each.number for each in made.steps] == [0, 1, 2] and kept(made) == []
    assert settings.hub_dir is not None
    published = settings.hub_dir / "org" / "second"
    weights = load_file(published / "model.safetensors")
    for layer in step.data["widths"]:
        assert len(weights[f"model.layers.{layer['layer']}.mlp.gate_proj.weight"]) == layer["channels"]
    manifest = json.loads((published / "secateur.json").read_text())
    assert manifest["job_id"] == str(made.id)
    delete_requested(session, open_store(settings))
    assert tensors(made, settings) == 0 and tensors(job, settings) == 3
    with pytest.raises(Problem) as caught:
        publish(job, settings, 0)
    assert (caught.value.status, caught.value.code) == (409, "step_not_kept") and "1, 2, 3" in caught.value.detail

    lost = publish(job, settings, 1)
    job.sql("expires_at = now()")
    retention.delete_expired(session)
    delete_requested(session, open_store(settings))
    assert kept(job) == [] and tensors(job, settings) == 0
    failed = attempt(lost, settings, session)
    assert failed.state == "failed" and failed.error is not None and failed.error["code"] == "checkpoint_damaged"
    with pytest.raises(Problem) as caught:
        publish(job, settings, 2)
    assert "steps that have one: none" in caught.value.detail


def test_a_step_is_kept_within_the_quota(
    make_job: MakeJob, request_of_steps: dict[str, Any], settings: Settings, session: Session, monkeypatch: Any
) -> None:
    monkeypatch.setattr(settings, "max_stored_bytes", 1)
    job = make_job(**request_of_steps)
    assert attempt(job, settings, session).state == "succeeded"
    assert kept(job) == [3] and tensors(job, settings) == 1, "the newest is what the job itself needs"
    assert ["is not kept" in each["message"] for each in job.events("warning")][-2:] == [True, True]


def test_a_job_that_has_not_ended_publishes_no_step(make_job: MakeJob, settings: Settings) -> None:
    job = make_job(keep_steps=True)
    with pytest.raises(Problem) as caught:
        publish(job, settings, 1)
    assert (caught.value.status, caught.value.code) == (409, "wrong_state")


def test_only_the_owner_publishes_a_step(make_job: MakeJob, settings: Settings) -> None:
    job = make_job(keep_steps=True)
    asking = service.publish_step(settings, Caller(uuid.uuid4(), USER), job.id, 1, StepPublication(), None)
    with pytest.raises(Problem) as caught:
        asyncio.run(asking)
    assert caught.value.status == 404
