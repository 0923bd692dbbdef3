"""The extras of the distribution: packages that only some tasks need, checked before such a task begins."""

from importlib.util import find_spec

from secateur.contract.errors import ErrorCode, PruningError

EXTRAS = {
    "engine": ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "gguf", "sentencepiece"),
    "eval": ("lm_eval", "matplotlib"),
    "gguf": ("llama_cpp",),
    "server": ("fastapi", "uvicorn", "celery", "redis", "sqlalchemy", "psycopg", "alembic"),
}
"""The modules that show whether an extra is installed."""


class MissingExtra(PruningError, ImportError):
    """A task needs an extra that is not installed; the message names the extra and the command that installs it."""


def missing(extra: str) -> list[str]:
    """The modules of ``extra`` that are not installed. Nothing is imported."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require(extra: str, task: str, *modules: str, field: str | None = None) -> None:
    """Refuse ``task``, the subject of the message, when modules of ``extra`` are not installed.

    ``modules`` are those that the task needs, by default all of the extra; ``field`` is the request field that wants the task.

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
