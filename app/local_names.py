"""The names of the operator's models, texts and tasks, as requests name them."""

from app.config import Settings
from app.storage import library
from secateur.catalog.sources import LOCAL_NAME, LOCAL_PREFIX
from secateur.catalog.spec import ZERO_SHOT

TASK_SUFFIX = ".jsonl"


def models(settings: Settings) -> list[str]:
    """Return ``local:NAME`` of each model, in order."""
    return [LOCAL_PREFIX + name for name in library.names(settings, "models") if LOCAL_NAME.fullmatch(name)]


def texts(settings: Settings) -> list[str]:
    """Return ``local:NAME`` of each text, in order."""
    return [LOCAL_PREFIX + name for name in library.names(settings, "texts") if LOCAL_NAME.fullmatch(name)]


def tasks(settings: Settings) -> list[str]:
    """Return the names of the zero-shot tasks: those of the library ``lm_eval``'s form, then the operator's, in order."""
    own = library.names(settings, "tasks")
    return [*ZERO_SHOT, *(name.removesuffix(TASK_SUFFIX) for name in own if name.endswith(TASK_SUFFIX))]
