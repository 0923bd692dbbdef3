"""The roles that the processes of the service have."""

from enum import StrEnum


class Role(StrEnum):
    """What a container of the image runs as."""

    API = "api"
    WORKER = "worker"
    SCHEDULER = "scheduler"
