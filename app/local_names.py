"""The names of the models, texts and tasks in the service's folders, as requests name them."""

from app.config import Settings
from secateur.catalog.sources import LOCAL_NAME, LOCAL_PREFIX
from secateur.catalog.spec import ZERO_SHOT

TASK_SUFFIX = ".jsonl"


def models(settings: Settings) -> list[str]:
    """Return ``local:NAME`` of each folder of the models folder, in order."""
    return sorted(
        f"{LOCAL_PREFIX}{path.name}" for path in settings.models_dir.glob("*") if path.is_dir() and _named(path.name)
    )


def texts(settings: Settings) -> list[str]:
    """Return ``local:NAME`` of each file of the texts folder, in order."""
    return sorted(
        f"{LOCAL_PREFIX}{path.name}" for path in settings.texts_dir.glob("*") if path.is_file() and _named(path.name)
    )


def tasks(settings: Settings) -> list[str]:
    """Return the names of the zero-shot tasks: those of the library, then those of the tasks folder, in order."""
    return [*ZERO_SHOT, *sorted(path.stem for path in settings.tasks_dir.glob(f"*{TASK_SUFFIX}"))]


def _named(name: str) -> bool:
    return LOCAL_NAME.fullmatch(name) is not None
