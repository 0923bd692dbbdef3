# mypy: disable-error-code="import-not-found"
"""Use the generated client, which is on the path as ``generated``: ``use_generated_client.py URL KEY MODEL_ID``."""

import sys
from http import HTTPStatus

from generated.api.jobs import (
    cancel_v1_jobs_job_id_cancel_post as cancel,
)
from generated.api.jobs import (
    create_v1_jobs_post as create,
)
from generated.api.jobs import (
    events_v1_jobs_job_id_events_get as events,
)
from generated.api.jobs import (
    get_v1_jobs_job_id_get as get,
)
from generated.api.jobs import (
    newest_v1_jobs_get as newest,
)
from generated.client import AuthenticatedClient
from generated.models import DryRun, EventPage, JobPage, JobRequest, JobView, ProblemDetails, State

url, key, model_id = sys.argv[1:]
client = AuthenticatedClient(base_url=url, token=key)
request = JobRequest.from_dict(
    {"model_id": model_id, "target_ratio": 0.2, "method": "piem-lsps", "evaluation": {"latency": "slimllm"}}
)

planned = create.sync(client=client, body=request, validate_only=True)
assert isinstance(planned, DryRun) and planned.model_id == model_id, planned

answer = create.sync_detailed(client=client, body=request, prefer="wait=1")
assert answer.status_code == HTTPStatus.ACCEPTED and answer.headers["Preference-Applied"] == "wait=1", answer
job = answer.parsed
assert isinstance(job, JobView) and job.state == State.QUEUED, job
assert job.request["evaluation"]["latency"] == "slimllm", job.request

found = get.sync(job.id, client=client)
assert isinstance(found, JobView) and found.id == job.id, found

listed = newest.sync(client=client, state=[State.QUEUED])
assert isinstance(listed, JobPage) and [item.id for item in listed.items] == [job.id], listed

cancelled = cancel.sync(job.id, client=client)
assert isinstance(cancelled, JobView) and cancelled.state == State.CANCELLED, cancelled

page = events.sync(job.id, client=client)
assert isinstance(page, EventPage) and [event.data["to"] for event in page.items] == ["queued", "cancelled"], page

refused = create.sync(client=client, body=JobRequest.from_dict({**request.to_dict(), "model_id": "local:absent"}))
assert isinstance(refused, ProblemDetails) and refused.code == "model_not_found", refused
