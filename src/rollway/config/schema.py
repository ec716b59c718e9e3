"""JSON schemas of the YAML files, and the config reference in the docs, made from the models."""

from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from rollway.config.experiment import Experiment, RunConfig
from rollway.config.recipes import Recipe


def json_schema(model: str) -> dict[str, Any]:
    """Schema of `config` (config.yaml, runs and defaults included) or `recipe`."""
    if model == "recipe":
        return _partial(Recipe).model_json_schema()
    schema = Experiment.model_json_schema()
    run = _partial(RunConfig).model_json_schema()
    schema.setdefault("$defs", {}).update(run.pop("$defs", {}))
    schema["$defs"]["Run"] = run
    schema["properties"]["defaults"] = {
        "$ref": "#/$defs/Run",
        "description": schema["properties"]["defaults"].get("description", ""),
    }
    schema["properties"]["runs"]["additionalProperties"] = {"$ref": "#/$defs/Run"}
    return schema


def _partial(model: type[BaseModel]) -> type[BaseModel]:
    """The model without required fields: a run inherits what it does not say from its recipe and `defaults`."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        fields[name] = (field.annotation, field if not field.is_required() else None)
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return create_model(model.__name__, __config__=config, __doc__=model.__doc__, **fields)
