"""Name the roles of the service's processes."""

from enum import StrEnum


class Role(StrEnum):
    """The role that a container of the image has."""

    API = "api"
    WORKER = "worker"
    SCHEDULER = "scheduler"
