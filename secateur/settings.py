"""The settings of the library and its command line, which are read from the environment."""

from functools import lru_cache
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class LibrarySettings(BaseSettings):
    """The folders of models and texts, and the access to the Hub.

    Every environment variable has the prefix ``SECATEUR_``; ``HF_TOKEN`` and ``HF_ENDPOINT`` are also read.
    """

    model_config = SettingsConfigDict(env_prefix="SECATEUR_", populate_by_name=True, hide_input_in_errors=True)

    data_dir: Path = Path(".secateur")
    """The folder with ``models/`` (``local:NAME`` models), ``texts/`` (``local:NAME`` texts) and ``tasks/``.

    ``tasks/`` contains zero-shot tasks.
    """
    hf_token: SecretStr | None = Field(None, validation_alias=AliasChoices("SECATEUR_HF_TOKEN", "HF_TOKEN"))
    hf_endpoint: str | None = Field(None, validation_alias=AliasChoices("SECATEUR_HF_ENDPOINT", "HF_ENDPOINT"))

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def texts_dir(self) -> Path:
        return self.data_dir / "texts"

    @property
    def tasks_dir(self) -> Path:
        return self.data_dir / "tasks"


@lru_cache
def get_settings() -> LibrarySettings:
    """Return the settings of the process, which are read once."""
    return LibrarySettings()
