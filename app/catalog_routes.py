"""The catalog: the service's methods, its local models, texts and tasks, and a model's prunable structure, without a job."""

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import SecretStr

from app import local_names
from app.config import Settings
from app.db.session import reading
from app.deps import EVERY_V1_ROUTE, KeyedRoute, Owner, SettingsDep
from app.http.problem import documented
from app.jobs import admission, tokens
from secateur.catalog.inspection import layouts, sizes, structures
from secateur.catalog.methods import ALLOCATORS, LAYERWISE_RECOVERIES, METHODS, SCORERS, TRAININGS, Method
from secateur.catalog.request import ModelRef
from secateur.catalog.structures import STRUCTURES
from secateur.contract.catalog import Inspection, Kinds, MethodList, MethodView, NameList
from secateur.contract.errors import PruningError
from secateur.contract.jobs import JobError
from secateur.contract.keys import Scope


class CatalogRoute(KeyedRoute):
    """A route of the catalog; its ``POST`` creates nothing and therefore needs the scope ``read`` only."""

    writing = Scope.READ


router = APIRouter(
    prefix="/v1",
    tags=["catalog"],
    route_class=CatalogRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


@router.get("/methods", response_model=MethodList)
def methods() -> MethodList:
    """List the pruning methods: for each method its paper, what it scores and what it needs."""
    kinds = Kinds(
        scorer=list(SCORERS),
        allocator=list(ALLOCATORS),
        layerwise_recovery=list(LAYERWISE_RECOVERIES),
        training=list(TRAININGS),
        structures={
            structure: [name for name, scorer in SCORERS.items() if structure in scorer.structures]
            for structure in STRUCTURES
        },
    )
    return MethodList(items=[_view(method) for method in METHODS.values()], kinds=kinds)


def _view(method: Method) -> MethodView:
    return MethodView(
        **{name: value for name, value in vars(method).items() if name in MethodView.model_fields},
        needs=sorted(method.needs),
        structures=list(method.structures),
        scorers=method.scorers,
        needs_gradients=method.needs_gradients,
    )


@router.get("/models", response_model=NameList)
def models(settings: SettingsDep) -> NameList:
    """List the models of the service's models folder, as `model_id` names them."""
    return NameList(items=local_names.models(settings))


@router.get("/texts", response_model=NameList)
def texts(settings: SettingsDep) -> NameList:
    """List the texts of the service's texts folder, as `dataset` names them."""
    return NameList(items=local_names.texts(settings))


@router.get("/tasks", response_model=NameList)
def tasks(settings: SettingsDep) -> NameList:
    """List the zero-shot tasks of the library and of the service's tasks folder, as `evaluation.zero_shot` names them."""
    return NameList(items=local_names.tasks(settings))


@router.post("/models/inspect", response_model=Inspection, responses=documented(400, 413))
async def inspect(body: ModelRef, owner: Owner, settings: SettingsDep) -> Inspection:
    """Return a model's architecture and the structures that can be pruned. No job is created."""

    def find_token() -> SecretStr | None:
        with reading() as session:
            return tokens.for_request(session, settings, owner.id, body.hub_token).token

    token = await run_in_threadpool(find_token)
    return await admission.checked(lambda: _inspect(body, settings, token), body, settings, owner.id)


def _inspect(body: ModelRef, settings: Settings, token: SecretStr | None) -> Inspection:
    try:
        source, shape = admission.look(body, settings, token)
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
        structures=[] if shape is None else structures(shape, source.config or {}),
    )
