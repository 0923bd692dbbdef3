"""Removal of the service's paths and secrets from text that the owner of a job sees: errors, reports and log lines."""

import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import make_url

from app.config import Settings

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Smallest number of characters of a value that is taken for a secret; shorter values occur in ordinary text."""
SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD)(?:_|$)|_KEYS?$", re.IGNORECASE)
"""Names of environment variables whose values are secrets, such as the credentials of a store."""
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{6,}"  # Hub tokens
    r"|\bsk-secateur-[\w-]+"  # API keys
    r"|\bwhsec_[A-Za-z0-9+/=]+"  # secrets of webhooks
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password of a URL
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{6,}"  # the Authorization header
)
PATH = re.compile(r"(?:file://|(?<![\w/.~…-]))/(?!v1/)(?:[^\s/'\"`:;,()<>\[\]{}|]+/)+([^\s/'\"`:;,()<>\[\]{}|]*)")
"""An absolute path with at least one folder. Paths of the API are no paths of files."""


class Sanitiser:
    """Hides the secrets of this process and a job, and the places of the service's files."""

    def __init__(self, settings: Settings, secrets: Iterable[SecretStr | None] = ()) -> None:
        """Read the secrets from the settings and the environment; ``secrets`` are further ones, such as a job's token."""
        known = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
        for secret in (
            settings.hf_token,
            settings.webhook_secret,
            settings.secret_keys,
            *_values(settings.storage_options),
            *secrets,
        ):
            known |= set() if secret is None else set(secret.get_secret_value().split(","))
        urls = (settings.database_url, settings.broker_url, settings.mlflow_tracking_uri)
        known |= {str(make_url(url).password or "") for url in urls if url is not None}
        self._secrets = _any_of(secret for secret in known if len(secret) >= SHORTEST_SECRET)
        # Temporary folders may be in the data folder, and the data folder may be in the home folder: longest first.
        folders = {str(folder) for folder in _folders(settings) if len(Path(folder).parts) > 1}
        self._folders = _any_of(folders, before=r"(?<![\w/.~-])", after=r"(?=[/\s'\"`:;,()<>\[\]{}|]|$|\.(?:\s|$))")

    def __call__(self, value: Any) -> Any:
        """Return ``value``, JSON-like data, with all text cleaned.

        A secret becomes ``***``. A folder of the service becomes ``…``, and of other absolute paths the name remains.
        """
        match value:
            case str():
                return self._clean(value)
            case dict():
                return {name: self(item) for name, item in value.items()}
            case list() | tuple():
                return [self(item) for item in value]
        return value

    def _clean(self, text: str) -> str:
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        text = SECRETS.sub(HIDDEN, text)
        if self._folders is not None:
            text = self._folders.sub("…", text)
        return PATH.sub(r"…/\1", text)


def _values(options: SecretStr | None) -> list[SecretStr]:
    """Return the values of a JSON object of options, each of which may be a credential."""
    return (
        [] if options is None else [SecretStr(str(value)) for value in json.loads(options.get_secret_value()).values()]
    )


def _folders(settings: Settings) -> Iterable[str | Path]:
    given = [settings.data_dir] if settings.hub_dir is None else [settings.data_dir, settings.hub_dir]
    yield from (folder for folder in given if folder.is_absolute())
    yield from (folder.resolve() for folder in given)
    yield from (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(__file__).parents[1])
    yield from (sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"))


def _any_of(texts: Iterable[str], before: str = "", after: str = "") -> re.Pattern[str] | None:
    """Return a pattern that matches each of ``texts``, the longest first, or ``None`` without texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first))}){after}") if longest_first else None
