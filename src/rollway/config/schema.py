"""JSON schemas of the YAML files, made from the models."""

from typing import Any

from rollway.config.experiment import Experiment, RunConfig
from rollway.config.recipes import Recipe


def json_schema(model: str) -> dict[str, Any]:
    """Schema of `config` (config.yaml, runs and defaults included) or `recipe`."""
    if model == "recipe":
        return _partial(Recipe.model_json_schema())
    schema = Experiment.model_json_schema()
    run = _partial(RunConfig.model_json_schema())
    schema.setdefault("$defs", {}).update(run.pop("$defs", {}))
    schema["$defs"]["Run"] = run
    schema["properties"]["defaults"] = {
        "$ref": "#/$defs/Run",
        "description": schema["properties"]["defaults"].get("description", ""),
    }
    schema["properties"]["runs"]["additionalProperties"] = {"$ref": "#/$defs/Run"}
    return schema


def _partial(schema: Any) -> Any:
    """The schema of a mapping that others are merged under: nothing in it is required.

    Without its `kind`, which may be inherited, a mapping can fit several kinds: `anyOf` in place of `oneOf`.
    """
    match schema:
        case dict():
            kept = {key: value for key, value in schema.items() if key not in ("required", "discriminator")}
            return {"anyOf" if key == "oneOf" else key: _partial(value) for key, value in kept.items()}
        case list():
            return [_partial(item) for item in schema]
        case _:
            return schema
