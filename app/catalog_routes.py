"""``/v1/methods`` and ``/v1/models/inspect``: what this service can do, before a job is made."""

from typing import Any, get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.auth.service import Scope
from app.catalog.errors import PruningError
from app.catalog.inspection import PossibleLayout, PrunedSize, layouts, sizes
from app.catalog.methods import METHODS, Allocator, Method, RecoveryKind, Scorer
from app.deps import EVERY_V1_ROUTE, KeyedRoute, Owner, SessionDep, SettingsDep
from app.jobs import door, tokens
from app.jobs.schemas import JobError, ModelRef
from app.kit.problem import documented


class CatalogRoute(KeyedRoute):
    """Its ``POST`` makes nothing."""

    writing = Scope.READ


router = APIRouter(
    prefix="/v1",
    tags=["catalog"],
    route_class=CatalogRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


class MethodDefaults(BaseModel):
    """What a request that names the method alone gets."""

    rounds: int
    scoring: str
    allocation: str
    recovery: str


class MethodView(BaseModel):
    """A pruning method."""

    name: str
    summary: str
    paper: str
    equations: str = Field(description="Where in the paper.")
    scoring: str = Field(description="What a unit is scored by.")
    allocation: str = Field(description="How the ratio is spread over the layers.")
    recovery: str
    needs_gradients: bool
    passes: str = Field(description="What scoring costs a round.")
    defaults: MethodDefaults


class Kinds(BaseModel):
    """What a method's parts can be replaced by.

    In any combination but one: the allocation `threshold` needs scores of the whole model, which the scorings `lorap`,
    `obs`, `slimllm` and `wanda` do not give.
    """

    scoring: list[str] = Field(description="For `scoring.kind`.")
    allocation: list[str] = Field(description="For `allocation.kind`.")
    recovery: list[str] = Field(description="For `recovery.kind`.")


class MethodList(BaseModel):
    """The methods, by name."""

    items: list[MethodView]
    kinds: Kinds


class Inspection(BaseModel):
    """What is known of a model without its weights."""

    model_id: str
    revision: str | None = Field(description="The commit; null for a local model.")
    supported: bool = Field(description="Whether this service can prune it.")
    reason: JobError | None = Field(description="Why not.")
    shape: dict[str, Any] | None = Field(
        description="Family, parameters, largest ratio, and each layer's heads, KV groups and feed-forward width; "
        "null for a model that is not supported, and where it is known once the model is loaded: GGUF files on the Hub and types without an adapter."
    )
    sizes: list[PrunedSize] = Field([], description="What ratios of 0.2 and 0.5 come to; empty without a shape.")
    layouts: list[PossibleLayout] = Field([], description="What each layout allows; empty without a shape.")


@router.get("/methods", response_model=MethodList)
def methods() -> MethodList:
    """Each method: its paper, what it scores, what it needs."""
    kinds = Kinds(
        scoring=list(get_args(Scorer)), allocation=list(get_args(Allocator)), recovery=list(get_args(RecoveryKind))
    )
    return MethodList(items=[_view(method) for method in METHODS.values()], kinds=kinds)


def _view(method: Method) -> MethodView:
    defaults = MethodDefaults(
        rounds=method.default_rounds, scoring=method.scoring, allocation=method.allocation, recovery=method.recovery
    )
    return MethodView(**vars(method), needs_gradients=method.needs_gradients, defaults=defaults)


@router.post("/models/inspect", response_model=Inspection, responses=documented(400, 413))
def inspect(body: ModelRef, owner: Owner, session: SessionDep, settings: SettingsDep) -> Inspection:
    """A model's architecture and what can be pruned of it, before a job is made."""
    token = tokens.for_request(session, settings, owner.id, body.hub_token)
    session.rollback()  # hands the connection back while the Hub is asked
    try:
        source, shape = door.look(body, settings, token)
    except PruningError as error:
        if error.code != "unsupported_architecture":
            raise
        reason = JobError(**error.as_dict())
        return Inspection(model_id=body.model_id, revision=body.revision, supported=False, reason=reason, shape=None)
    return Inspection(
        model_id=body.model_id,
        revision=source.revision,
        supported=True,
        reason=None,
        shape=None if shape is None else shape.as_dict(),
        sizes=[] if shape is None else sizes(shape, source.dtype),
        layouts=[] if shape is None else layouts(shape, source.config or {}),
    )
