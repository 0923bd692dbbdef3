"""The extras of the distribution: packages that only some tasks need. They are checked before such a task begins."""

from importlib.util import find_spec

from secateur.contract.errors import ErrorCode, PruningError

EXTRAS = {
    "engine": ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "gguf", "sentencepiece"),
    "eval": ("lm_eval", "matplotlib"),
    "gguf": ("llama_cpp",),
    "server": ("fastapi", "uvicorn", "celery", "redis", "sqlalchemy", "psycopg", "alembic"),
    "telemetry": (
        "opentelemetry.sdk",
        "opentelemetry.exporter.otlp.proto.http",
    ),
}
"""The modules that show whether an extra is installed."""


class MissingExtra(PruningError, ImportError):
    """A task needs an extra that is not installed; the message names the extra and the command to install it."""


def missing(extra: str) -> list[str]:
    """Return the modules of ``extra`` that are not installed; no module is imported, except packages that contain one."""
    return [module for module in EXTRAS[extra] if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would contain the module is not installed
        return False


def require(extra: str, task: str, *modules: str, field: str | None = None) -> None:
    """Refuse ``task`` if modules of ``extra`` are not installed.

    ``task`` is the subject of the error message. ``modules`` are the modules that the task needs, by default all
    modules of the extra. ``field`` is the request's field that needs the task.

    Raises:
        MissingExtra: ``dependency_missing``.
    """
    absent = [module for module in missing(extra) if module in modules or not modules]
    if absent:
        raise MissingExtra(
            ErrorCode.DEPENDENCY_MISSING,
            f"{task} needs packages that are not installed ({', '.join(absent)}): pip install 'secateur[{extra}]'.",
            field=field,
        )
