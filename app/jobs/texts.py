"""The texts of a request, which are stored beside it: they can be megabytes, and only the job's worker needs them."""

from collections.abc import Mapping
from typing import Any

from app.jobs.models import Job
from secateur.contract.jobs import PARTS_WITH_TEXTS, without_texts


def set_apart(request: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a dumped request as the API shows it, and its texts by part, or ``None`` if it has none."""
    parts = {part: request[part] for part in PARTS_WITH_TEXTS if request.get(part) is not None}
    texts = {part: source["texts"] for part, source in parts.items() if source.get("texts") is not None}
    return without_texts(request), texts or None


def whole_request(job: Job) -> dict[str, Any]:
    """Return the job's request with its texts, which are read from the database here if the job has any."""
    texts = job.texts or {}
    return job.request | {part: job.request[part] | {"texts": given} for part, given in texts.items()}
