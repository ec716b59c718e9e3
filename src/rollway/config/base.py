"""What every configuration model shares: unknown keys are errors, values are frozen, docstrings are descriptions."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from rollway.errors import RollwayError


class Strict(BaseModel):
    """A configuration model: frozen, refuses unknown keys, field docstrings become JSON-schema descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=True)


class ConfigError(RollwayError):
    """A mistake in configuration: one sentence that names the file or key, and the mend."""


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merges two YAML mappings; `over` wins.

    A mapping whose `kind` or `sql` differs replaces the other whole: the fields of one kind mean nothing to another.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_kind(old, value):
            merged[key] = deep_merge(old, value)
        else:
            merged[key] = value
    return merged


def _other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(tag in new and new[tag] != old.get(tag) for tag in ("kind", "sql"))


def as_given(value: Any) -> Any:
    """JSON-able form of a model: what differs from its default, and every `kind`. New options change nothing."""
    match value:
        case BaseModel():
            named = {field.alias or name: getattr(value, name) for name, field in _given(value)}
            return as_given({**named, **(value.model_extra or {})})
        case dict():
            return {key: as_given(item) for key, item in value.items()}
        case list() | tuple():
            return [as_given(item) for item in value]
        case _:
            return value


def _given(model: BaseModel) -> list[tuple[str, FieldInfo]]:
    fields = type(model).model_fields.items()
    return [(name, field) for name, field in fields if name == "kind" or getattr(model, name) != field.get_default()]
