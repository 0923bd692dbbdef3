"""The Hub that the libraries of a run talk to."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hub_at(endpoint: str | None) -> Iterator[None]:
    """Make every library, and every child process, talk to the Hub at ``endpoint`` alone while the context lasts.

    ``datasets``, and ``lm_eval`` with it, take no endpoint as an argument. They read ``HF_ENDPOINT`` once, when
    ``huggingface_hub`` and ``datasets`` are imported, which may be before or within the context. Without ``endpoint``,
    nothing changes.
    """
    from huggingface_hub import constants

    if endpoint is None:
        yield
        return
    before, variable = constants.ENDPOINT, os.environ.get("HF_ENDPOINT")
    os.environ["HF_ENDPOINT"] = endpoint
    _point_libraries_to(endpoint.rstrip("/"))
    try:
        yield
    finally:
        os.environ.pop("HF_ENDPOINT")
        if variable is not None:
            os.environ["HF_ENDPOINT"] = variable
        _point_libraries_to(before)


def _point_libraries_to(endpoint: str) -> None:
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    if datasets := sys.modules.get("datasets.config"):
        vars(datasets).update(
            HF_ENDPOINT=endpoint, HUB_DATASETS_URL=endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
