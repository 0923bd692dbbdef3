"""Admission of jobs: checks the model, the ratio and the repository to publish to, before a job is accepted.

A job that cannot be checked now, because the Hub does not answer, is accepted; the worker checks it later.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx2
from fastapi.concurrency import run_in_threadpool
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import AnyHttpUrl, SecretStr

from app import hub, local_names
from app.config import Settings
from app.fleet.repository import Offer
from app.http.problem import invalid
from app.jobs.naming import default_repo_id, repo_ids
from app.jobs.routing import Required, waiting_for
from app.jobs.tokens import HubAccess
from app.storage import library
from app.storage.library import library_names, open_library
from app.webhooks.addresses import is_allowed_host
from secateur.catalog import memory
from secateur.catalog.architectures import ModelShape
from secateur.catalog.names import near
from secateur.catalog.request import JobRequest, ModelRef, Publish, check_repo_id
from secateur.catalog.resolve import Resolved, components, resolve
from secateur.catalog.sources import (
    LOCAL_NAME,
    LOCAL_PREFIX,
    UPLOAD_PREFIX,
    ModelSource,
    check_size,
    locate,
    read_shape,
)
from secateur.catalog.spec import ZERO_SHOT
from secateur.contract.errors import ErrorCode
from secateur.contract.jobs import DryRun, PlannedTarget, Publication

UNAUTHORIZED = (401, 403)
Answer = TypeVar("Answer")


async def checked(check: Callable[[], Answer], model: ModelRef, settings: Settings, owner_id: uuid.UUID) -> Answer:
    """Return what ``check``, a function of this module for this request, returns.

    The function runs in a thread: if the request needs the Hub, in one of :func:`app.hub.ask`.

    Raises:
        Problem: 503 or 429: the service, or the API key, is asking the Hub as much as it may.
    """
    publishes = isinstance(model, JobRequest) and model.publish is not None and settings.hub_dir is None
    if publishes or not model.model_id.startswith(LOCAL_PREFIX):
        return await hub.ask(owner_id, check)
    return await run_in_threadpool(check)


def look(model: ModelRef, settings: Settings, token: SecretStr | None) -> tuple[ModelSource, ModelShape | None]:
    """Return the model's source and its sizes.

    The sizes are ``None`` for a GGUF file on the Hub and for a model of a family without an adapter, whose sizes are
    known only after the model is loaded.

    Raises:
        PruningError: the model cannot be located or its sizes cannot be read (see
            :func:`secateur.catalog.sources.locate` and :func:`secateur.catalog.sources.read_shape`), or the model has
            more parameters than the service allows.
    """
    if model.model_id.startswith(LOCAL_PREFIX):
        folders = open_library(settings, *library_names({"model_id": model.model_id}), outline=True)
        source = locate(
            model.model_id, revision=model.revision, gguf_file=model.gguf_file, models_dir=folders.models_dir
        )
    else:
        secret = token.get_secret_value() if token else None
        source = hub.find_model(settings.hf_endpoint, secret, model.model_id, model.revision, model.gguf_file)
    shape = read_shape(source) if source.sizes_known else None
    check_size(shape, settings.max_model_parameters)
    return source, shape


def required(request: JobRequest, estimate: int | None) -> Required:
    """Return what the job requires of a worker: the memory is what the request says, or else the estimate in bytes."""
    wanted = request.requirements
    return Required(wanted.labels, estimate if wanted.memory_bytes is None else wanted.memory_bytes)


def dry_run(request: JobRequest, settings: Settings, token: SecretStr | None, offers: Sequence[Offer]) -> DryRun:
    """Return the plan of the job; ``offers`` is what the live workers offer.

    Raises:
        PruningError: the model does not exist or cannot be pruned as requested; retryable if the Hub does not answer.
    """
    source, shape = look(request, settings, token)
    resolved = needed = None
    if shape is not None:
        resolved = resolve(request, shape, config=source.config or {}, source_dtype=source.dtype)
        needed = _memory(request, resolved, source, shape, offers)
    return DryRun(
        model_id=request.model_id,
        revision=source.revision,
        method=request.method,
        rounds=components(request).rounds,
        targets=_targets(request, resolved, shape),
        publish=None if request.publish is None else Publication(**request.publish.model_dump()),
        memory_bytes=needed,
        waiting_for=waiting_for(required(request, needed), offers),
        shape=None if shape is None else shape.as_dict(),
    )


def _targets(request: JobRequest, resolved: Resolved | None, shape: ModelShape | None) -> list[PlannedTarget]:
    """Return, for each requested ratio, the nearest ratio that this model allows and the name of the repository."""
    found: list[tuple[float | None, float | None]]
    if resolved is None or shape is None:
        found = [(ratio, None) for ratio in request.requested_ratios]
    else:
        ratios = resolved.ratios if resolved.decided else request.requested_ratios
        found = [(ratio, resolved.nearest_ratio(shape, index)) for index, ratio in enumerate(ratios)]
    names = repo_ids(request.publish.repo_id, request) if request.publish else [None] * len(found)
    return [
        PlannedTarget(target_ratio=ratio, nearest_ratio=nearest, repo_id=name)
        for (ratio, nearest), name in zip(found, names, strict=True)
    ]


def _memory(
    request: JobRequest, resolved: Resolved, source: ModelSource, shape: ModelShape, offers: Sequence[Offer]
) -> int:
    """Return the least number of bytes of memory that the job needs on the largest of the workers that have its labels.

    Raises:
        PruningError: ``out_of_memory`` if all workers that have the labels are known to have too little memory. Nothing
            is raised if no such worker is live, because one may be started, or if the request names the memory itself.
    """
    labelled = [offer for offer in offers if required(request, None).labelled(offer)]
    largest = max(labelled, key=lambda offer: offer.memory_bytes or 0, default=None)
    on_cpu = largest is not None and largest.device == "cpu"
    mapped = on_cpu and resolved.dtype == source.dtype and source.gguf_file is None
    needed = memory.estimate(resolved, shape, memory.Place.MAPPED if mapped else memory.Place.RESIDENT)
    sizes = [offer.memory_bytes for offer in labelled if offer.memory_bytes is not None]
    if sizes and len(sizes) == len(labelled) and request.requirements.memory_bytes is None:
        if not on_cpu and needed.total > max(sizes) and memory.streams(resolved):
            needed = memory.estimate(resolved, shape, memory.Place.STREAMED)
        memory.check_fits(resolved, needed, max(sizes))
    return needed.total


def admit(request: JobRequest, settings: Settings, access: HubAccess) -> JobRequest:
    """Check that this service can serve the request and return it with a default repository name if it has none.

    The request gets a default repository name, in the API key's namespace, only if the service publishes into a folder.

    Raises:
        Problem: 422 if this service cannot serve the request.
    """
    if request.webhook_url is not None and settings.webhook_secret is None:
        raise invalid(
            "webhook_url",
            "this service has no SECATEUR_WEBHOOK_SECRET to sign webhooks with",
            code=ErrorCode.WEBHOOKS_DISABLED,
        )
    if request.webhook_url is not None and not is_allowed_host(
        AnyHttpUrl(request.webhook_url).host or "", settings.webhook_networks
    ):
        message = "this service sends webhooks to public addresses only, and to those its operator allows"
        raise invalid("webhook_url", message, code=ErrorCode.WEBHOOK_URL_FORBIDDEN, allowed="a public host")
    sources = (
        ("calibration", request.calibration),
        ("evaluation", request.evaluation),
        ("vocabulary", request.vocabulary),
    )
    for purpose, source in sources:
        if source is not None and source.dataset is not None:
            _check_dataset(f"{purpose}.dataset", source.dataset, settings)
    for index, name in enumerate(request.evaluation.perplexity):
        _check_dataset(f"evaluation.perplexity.{index}", name, settings)
    for index, name in enumerate(request.evaluation.zero_shot):
        if name not in (own := local_names.tasks(settings)):
            known = [*ZERO_SHOT, *near(name, own[len(ZERO_SHOT) :])]
            message = f"there is no task '{name}'"
            raise invalid(
                f"evaluation.zero_shot.{index}", message, code=ErrorCode.TASK_NOT_FOUND, allowed=", ".join(known)
            )
    if request.publish is None:
        if settings.hub_dir is None:
            return request
        return request.model_copy(update={"publish": Publish(repo_id=default_repo_id(request, access.namespace))})
    for name in repo_ids(request.publish.repo_id, request):
        try:
            check_repo_id(name)
        except ValueError as error:
            raise invalid("publish.repo_id", str(error)) from None
    if settings.hub_dir is None and access.token is None:
        message = (
            "there is no Hub token: neither 'hub_token' nor the API key's, and the service's (SECATEUR_HF_TOKEN) is not set "
            "or not lent to this API key"
        )
        raise invalid("publish.repo_id", message, code=ErrorCode.HUB_FORBIDDEN)
    if access.restricted and request.publish.repo_id.split("/")[0] != access.namespace:
        message = "this API key may not publish to another namespace than its own"
        if settings.hub_dir is None:
            message += " with the service's Hub token"
        raise invalid(
            "publish.repo_id", message, code=ErrorCode.NAMESPACE_FORBIDDEN, allowed=f"namespace {access.namespace}"
        )
    if settings.hub_dir is None and access.token is not None:
        _check_may_write(request.publish.repo_id, settings, access.token)
    return request


def _check_dataset(field: str, dataset: str, settings: Settings) -> None:
    """Check that ``dataset`` names an existing text of the texts folder, or may name a data set on the Hub.

    ``dataset`` is never a path. An uploaded data set is checked with the rest of what belongs to an API key.

    Raises:
        Problem: 422 if the text does not exist or the name is not that of a data set.
    """
    if dataset.startswith(UPLOAD_PREFIX):
        return
    if dataset.startswith(LOCAL_PREFIX):
        wanted, own = dataset.removeprefix(LOCAL_PREFIX), library.names(settings, "texts")
        if wanted not in own or not LOCAL_NAME.fullmatch(wanted):
            allowed = (
                ", ".join(LOCAL_PREFIX + name for name in near(wanted, own))
                or "a text of the service's library, see GET /v1/texts"
            )
            raise invalid(field, f"there is no text '{dataset}'", code=ErrorCode.TEXT_NOT_FOUND, allowed=allowed)
    else:
        try:
            validate_repo_id(dataset.partition(":")[0])
        except HFValidationError:
            message = f"'{dataset}' is no data set"
            raise invalid(
                field, message, allowed="wikitext2, ptb, c4, org/name, org/name:config, local:NAME, upload:ID"
            ) from None


def _check_may_write(repo_id: str, settings: Settings, token: SecretStr) -> None:
    """Check that the Hub token may write to the namespace of ``repo_id``.

    Only the namespace decides, so the check also covers the names that are made from ``repo_id``. If the Hub does not
    answer or fails otherwise, the check passes.

    Raises:
        Problem: 422 if the Hub refuses the token or its rights do not suffice.
    """
    try:
        me = hub.whoami(settings.hf_endpoint, token.get_secret_value())
    except HfHubHTTPError as error:
        if error.response.status_code in UNAUTHORIZED:
            message = "the Hub does not accept the token"
            raise invalid("publish.repo_id", message, code=ErrorCode.HUB_FORBIDDEN) from None
        return
    except (httpx2.HTTPError, OSError, ValueError):
        return
    namespaces = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    if repo_id.split("/")[0] not in namespaces:
        message = "the Hub token may not write there"
        raise invalid(
            "publish.repo_id",
            message,
            code=ErrorCode.HUB_FORBIDDEN,
            allowed=f"namespaces {', '.join(sorted(namespaces))}",
        )
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise invalid("publish.repo_id", "the Hub token may only read", code=ErrorCode.HUB_FORBIDDEN)
