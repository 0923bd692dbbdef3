"""``/v1/datasets``: the HTTP interface of :mod:`app.datasets.service`."""

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints
from starlette.requests import ClientDisconnect

from app.datasets import service
from app.datasets.content import Content, JsonLines, PlainText
from app.datasets.models import Dataset
from app.deps import EVERY_V1_ROUTE, KeyedRoute, KeyId, Owner, SessionDep, SettingsDep, chosen_key
from app.http import pages
from app.http.pages import PageSize, PageToken
from app.http.places import Places
from app.http.problem import Problem, documented, excerpt
from secateur.contract.datasets import JSON_LINES, DatasetPage, DatasetView
from secateur.contract.errors import ErrorCode
from secateur.contract.keys import Scope

TYPES: dict[str, Callable[[], Content]] = {
    "text/plain": PlainText,
    "application/x-ndjson": JsonLines,
    "application/jsonl": JsonLines,
}
BY_NAME = "application/octet-stream"
"""A type with which the name of the data set says what the content is."""
_uploads = Places(each=4)

Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"),
    Query(description="A name to find the data set by; several may have the same."),
]


class DatasetRoute(KeyedRoute):
    """A route to data sets that exist; the scope ``admin`` opens the route too, and shows those of all API keys."""

    instead = Scope.ADMIN


router = APIRouter(
    prefix="/v1/datasets",
    tags=["datasets"],
    route_class=DatasetRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


async def upload(request: Request, response: Response, owner: Owner, settings: SettingsDep, name: Name) -> Dataset:
    """Upload a data set: a UTF-8 text, or JSON Lines of texts or of chats.

    Each line of JSON Lines is `{"text": …}`, or each is `{"messages": [{"role": …, "content": …}, …]}`. The data set is
    checked while it arrives. Jobs name it as `upload:ID`. The type of the body is `text/plain`, `application/x-ndjson` or
    `application/jsonl`; with `application/octet-stream`, a name that ends with `.jsonl` or `.ndjson` stands for JSON
    Lines, and any other name for text.
    """
    content = _content(request, name)
    declared = int(request.headers.get("content-length", 0))
    with _uploads.taken(owner.id, "uploads"):
        dataset = await service.upload(settings, owner.id, name, declared, _chunks(request), content)
    response.headers["Location"] = f"/v1/datasets/{dataset.id}"
    return dataset


router.add_api_route(
    "",
    upload,
    methods=["POST"],
    status_code=201,
    response_model=DatasetView,
    responses=documented(400, 413, 415),
    route_class_override=KeyedRoute,
    # Generators of clients know this type of the body alone.
    openapi_extra={
        "requestBody": {"required": True, "content": {BY_NAME: {"schema": {"type": "string", "format": "binary"}}}}
    },
)


def _content(request: Request, name: str) -> Content:
    """Return the checks on the content that the request declares; ``name`` is the data set's.

    Raises:
        Problem: 415 if the type is no data set's, is not declared as UTF-8, or is compressed.
    """
    given = request.headers.get("content-type", "")
    media_type, _, parameters = (part.strip().lower() for part in given.partition(";"))
    charset = parameters.replace('"', "").removeprefix("charset=")
    types = TYPES | {BY_NAME: JsonLines if name.endswith(JSON_LINES) else PlainText}
    if media_type not in types or charset not in ("", "utf-8", "utf8"):
        detail = f"The body is of the type '{excerpt(given)}'; a data set is of the type {', '.join(types)}, in UTF-8."
        raise Problem(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, detail, headers={"Accept": ", ".join(types)})
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        detail = f"The body has the encoding '{excerpt(encoding)}'; send it without a Content-Encoding."
        raise Problem(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, detail, headers={"Accept-Encoding": "identity"})
    return types[media_type]()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Problem(400, ErrorCode.MALFORMED_REQUEST, "The body ended early.") from None


@router.get("", response_model=DatasetPage)
def newest(
    owner: Owner, session: SessionDep, key_id: KeyId = None, page_size: PageSize = 50, page_token: PageToken = None
) -> DatasetPage:
    """List the data sets of this API key, newest first."""
    before = pages.decode(page_token, uuid.UUID)
    found, cursor = service.page(session, chosen_key(owner, key_id), before, page_size)
    items = [DatasetView.model_validate(dataset) for dataset in found]
    return DatasetPage(items=items, next_page_token=pages.encode(cursor) if cursor else None)


@router.get("/{dataset_id}", response_model=DatasetView, responses=documented(404))
def get(dataset_id: uuid.UUID, owner: Owner, session: SessionDep) -> Dataset:
    """Return a data set, without its content."""
    return service.get(session, owner, dataset_id)


@router.delete("/{dataset_id}", status_code=204, responses=documented(404, 409))
def delete(dataset_id: uuid.UUID, owner: Owner, session: SessionDep) -> None:
    """Delete a data set that no open job names. A job that names it and has ended cannot be run again."""
    service.delete(session, owner, dataset_id)
