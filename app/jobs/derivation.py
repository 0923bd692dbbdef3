"""Derived requests: the request of an earlier job with changes."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.config import Settings
from app.http.fields import problem_of
from app.jobs.models import Job
from app.jobs.naming import default_repo_id
from app.jobs.texts import whole_request
from secateur.catalog.request import DerivedRequest, JobRequest

REPLACED = {"target_ratio": ("goal",), "goal": ("target_ratio",), "model_id": ("revision", "gguf_file")}
"""The fields that get their defaults when another value of a field is given, because they belong to its old value."""


def derive(settings: Settings, earlier: Job, body: DerivedRequest) -> JobRequest:
    """Return the request of the job ``earlier`` with the changes of ``body``, a JSON Merge Patch (RFC 7386).

    The Hub token of the earlier job is not taken over. A repository name that this service chose for the earlier job is
    not taken over either, so that the new job gets a name of its own.

    Raises:
        Problem: 422 if the changed request is not valid; the problem names the fields at fault.
    """
    stored = JobRequest.model_validate(whole_request(earlier))
    fields = stored.model_dump(mode="json", exclude={"hub_token"})
    if settings.hub_dir is not None and stored.publish is not None:
        namespace, _, _ = stored.publish.repo_id.partition("/")
        if stored.publish.repo_id == default_repo_id(stored, namespace):
            fields["publish"] = None
    for name, others in REPLACED.items():
        if body.changes.get(name) not in (None, fields[name]):
            fields |= dict.fromkeys(others)
    try:
        return JobRequest.model_validate(patched(fields, body.changes) | {"hub_token": body.hub_token})
    except ValidationError as error:
        raise problem_of(error.errors(include_url=False, include_input=False), JobRequest) from None


def patched(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object ``fields`` after the JSON Merge Patch ``changes``: ``None`` removes a field, objects are merged.

    Unlike RFC 7386, ``None`` for a field that the object does not have stays in the result, where validation refuses
    it: the name may be misspelt.
    """
    merged = dict(fields)
    for name, value in changes.items():
        if value is None and name in fields:
            del merged[name]
        elif isinstance(value, Mapping):
            own = fields.get(name)
            merged[name] = patched(own if isinstance(own, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged
