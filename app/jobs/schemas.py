"""The filters of a list of jobs."""

from pydantic import BaseModel

from secateur.contract.states import State


class JobFilter(BaseModel):
    """The filters of a list of jobs."""

    state: list[State]
    method: str | None
    model_id: str | None
