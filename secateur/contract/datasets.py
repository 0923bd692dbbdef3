"""The bodies of the responses of ``/v1/datasets``."""

import datetime as dt
import uuid
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

JSON_LINES = (".jsonl", ".ndjson")
"""Ends of the names of files of JSON Lines."""


class DatasetKind(StrEnum):
    """What a data set consists of: one text, a list of texts, or a list of chats."""

    TEXT = "text"
    TEXTS = "texts"
    MESSAGES = "messages"


class DatasetView(BaseModel):
    """A data set that was uploaded. A job names it as `upload:ID`."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    kind: DatasetKind = Field(description="`text`: one text; `texts` and `messages`: each line is a text, or a chat.")
    size: int = Field(description="Number of bytes.")
    lines: int
    sha256: str = Field(description="SHA-256 hash of the content, in hexadecimal.")
    created_at: dt.datetime


class DatasetPage(BaseModel):
    """A page of data sets."""

    items: list[DatasetView]
    next_page_token: str | None = Field(description="`page_token` of the next page; null on the last one.")
