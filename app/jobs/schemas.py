"""What a list of jobs can be narrowed by."""

from pydantic import BaseModel

from secateur.contract.states import State


class JobFilter(BaseModel):
    """What a list of jobs can be narrowed by."""

    state: list[State]
    method: str | None
    model_id: str | None
