"""The settings of the library and its command line: the one place in the library that reads the environment."""

from functools import lru_cache
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class LibrarySettings(BaseSettings):
    """Where models and texts lie, and how the Hub is reached. Every variable has the prefix ``SECATEUR_``."""

    model_config = SettingsConfigDict(env_prefix="SECATEUR_", populate_by_name=True, hide_input_in_errors=True)

    data_dir: Path = Path(".secateur")
    """Holds ``models/`` (``local:NAME`` models), ``texts/`` (``local:NAME`` texts) and ``tasks/`` (zero-shot tasks)."""
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
    """The process's settings, read once."""
    return LibrarySettings()
