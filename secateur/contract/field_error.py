"""The part of a problem document that concerns one field, for the service and its clients."""

from pydantic import BaseModel, Field


class FieldError(BaseModel):
    """An error in one field of the request, with the values that are allowed."""

    field: str = Field(description="Dotted path of the field.", examples=["target_ratio"])
    message: str
    allowed: str | None = Field(None, description="What is allowed there.")
