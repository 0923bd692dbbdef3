"""Recipes: fields of a job request as YAML or JSON, which the command line, the library and the API accept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from secateur.catalog.request import JobRequest
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError


class RecipeInvalid(PruningError):
    """A recipe that cannot be read, or that has fields that are not allowed; ``reasons`` has a line for each."""

    def __init__(self, reasons: list[str], field: str | None = None) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, "\n".join(reasons), field=field)
        self.reasons = reasons


@dataclass(frozen=True)
class Recipe:
    """The fields of a job request by name; a field that is left out has its default."""

    fields: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a recipe from a YAML or JSON file.

        Raises:
            RecipeInvalid: The file cannot be read, is not YAML, or does not hold an object.
        """
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeInvalid([f"{path} cannot be read: {error}"], "recipe") from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from YAML text; JSON is a subset of YAML.

        Raises:
            RecipeInvalid: The text is not YAML, or does not hold an object.
        """
        try:
            fields = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeInvalid([f"The recipe is not YAML: {error}"], "recipe") from None
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise RecipeInvalid(["The recipe does not hold an object of fields; see docs/recipes.md."], "recipe")
        return cls(json.loads(json.dumps(fields, default=str)))

    def override(self, fields: Mapping[str, Any]) -> Self:
        """Return the recipe with ``fields`` in place of its own fields.

        Objects are merged field by field, and ``None`` leaves a field unchanged. A ratio in ``fields`` replaces a goal
        of the recipe, and a goal replaces a ratio.
        """
        merged = _merge(dict(self.fields), fields)
        for given, other in (("target_ratio", "goal"), ("goal", "target_ratio")):
            if fields.get(given) is not None:
                merged.pop(other, None)
        return type(self)(merged)

    @property
    def service_fields(self) -> list[str]:
        """The names of the fields that only the service uses, such as the repository, labels, webhooks and limits."""
        own = {*PruningSpec.model_fields, "model_id", "revision", "gguf_file"}
        return [name for name in self.fields if name in JobRequest.model_fields and name not in own]

    def spec(self) -> PruningSpec:
        """Return the fields that say how to prune.

        Raises:
            RecipeInvalid: A field is unknown, is missing, or has a value that is not allowed.
        """
        if unknown := sorted(self.fields.keys() - JobRequest.model_fields.keys()):
            allowed = ", ".join(JobRequest.model_fields)
            raise RecipeInvalid([f"{name}: unknown field; allowed: {allowed}" for name in unknown], unknown[0])
        try:
            return PruningSpec.of_request(dict(self.fields))
        except ValidationError as error:
            raise RecipeInvalid(*explain(error)) from None

    def dump(self) -> str:
        """The recipe as YAML."""
        text: str = yaml.safe_dump(dict(self.fields), sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def of_request(cls, request: Mapping[str, Any]) -> Self:
        """Return the recipe of a stored job request: the fields that are not default values, without the Hub token."""
        stored = JobRequest.model_validate(dict(request))
        fields = stored.model_dump(mode="json", exclude_defaults=True, exclude={"hub_token"})
        order = ["model_id", "target_ratio", "goal", "method"]
        return cls({name: fields[name] for name in [*order, *sorted(fields.keys() - set(order))] if name in fields})


def explain(error: ValidationError) -> tuple[list[str], str | None]:
    """Return one line for each field at fault, and the path of the first field at fault."""
    reasons, first = [], None
    for item in error.errors():
        field = ".".join(map(str, item["loc"]))
        first = first or field or None
        reasons.append(f"{field}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": "))
    return reasons, first


def _merge(base: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        if value is None:
            continue
        own = base.get(name)
        base[name] = (
            _merge(dict(own or {}), value) if isinstance(value, Mapping) and isinstance(own, dict | None) else value
        )
    return base
