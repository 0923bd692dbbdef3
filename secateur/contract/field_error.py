"""One field's part of a problem, for the service and its clients."""

from pydantic import BaseModel, Field


class FieldError(BaseModel):
    """What is wrong with one field of the request, and what would be right."""

    field: str = Field(description="Dotted path of the field.", examples=["target_ratio"])
    message: str
    allowed: str | None = Field(None, description="What is allowed there.")
