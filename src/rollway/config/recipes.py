"""Recipes: a method as data. `load_recipe` is public API."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rollway.config.assets import find, folder
from rollway.config.axes import Axes
from rollway.config.base import ConfigError, Strict, deep_merge
from rollway.config.curation import CurateConfig
from rollway.config.rollouts import RolloutConfig, Sampling
from rollway.config.scorers import ScoreConfig, TeacherScorer
from rollway.config.secrets import refuse_secrets
from rollway.config.teachers import LiveModel
from rollway.config.training import TrainConfig

M = TypeVar("M", bound=BaseModel)


class Recipe(Strict):
    """One method, complete: what is rolled out, how it is scored and curated, and how the policy is updated."""

    extends: str | None = None
    """Recipe whose settings this one starts from."""
    title: str = ""
    """Name of the method, spelt out."""
    paper: str = ""
    """Where it was published."""
    status: str = "complete"
    """complete, or what is missing."""
    axes: Axes | None = Field(None, exclude_if=lambda value: value is None)
    """Where a method of distillation stands in its survey; None: it is none."""
    rollout: RolloutConfig = RolloutConfig()
    """Which completions are sampled."""
    score: ScoreConfig = ScoreConfig()
    """How they are judged."""
    curate: CurateConfig = CurateConfig()
    """How they become the batch that is trained on."""
    train: TrainConfig
    """How the policy is updated."""

    @model_validator(mode="before")
    @classmethod
    def _generation_cap(cls, values: Any) -> Any:
        """Lengths that are not given are the generation cap: l_max of `seq_sum_const`, limit of `rewards/overlong`."""
        cap = _below(values, "rollout", "sampling", "max_tokens") or Sampling().max_tokens
        if _below(values, "curate", "reward", "sql") == "overlong" and "limit" not in values["curate"]["reward"]:
            values = deep_merge(values, {"curate": {"reward": {"limit": cap}}})
        aggregate = _below(values, "train", "objective", "aggregate")
        kind = aggregate if isinstance(aggregate, str) else _below(aggregate, "kind")
        if kind != "seq_sum_const" or _below(aggregate, "l_max") is not None:
            return values
        aggregate = {"kind": kind, **(aggregate if isinstance(aggregate, dict) else {}), "l_max": cap}
        return deep_merge(values, {"train": {"objective": {"aggregate": aggregate}}})

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        from rollway.config.checks import check_recipe

        check_recipe(self)
        return self

    def live_model(self) -> TeacherScorer | None:
        """The trainer's live teacher that is another model, as the scorer that would read what it reads, with its
        check. None where there is none, or where a scorer stands for it, whose check it is."""
        live, name = self.train.teacher, self.curate.teacher
        if live is None or live.model is None:
            return None
        stored = None if name is None else self.score.scorers[name]
        if not isinstance(stored, TeacherScorer):
            return TeacherScorer(model=live.model, check=live.check)
        reads_its_context = live.context == "privileged"
        same = stored.model == live.model and reads_its_context == bool(stored.context)
        if same or isinstance(stored.model, LiveModel):
            return None
        if reads_its_context:
            return stored.model_copy(update={"model": live.model, "check": live.check})
        return TeacherScorer(model=live.model, check=live.check)


def _below(value: Any, *keys: str) -> Any:
    """The value under nested keys, or None where a level is no mapping; wrong types are left to the fields."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def load_recipe(slug: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe `config/recipes/{slug}.yaml` (or a path), with `overrides` merged over it.

    Raises ConfigError that names the recipe, the key and the mend.
    """
    return parse(Recipe, deep_merge(recipe_mapping(slug), overrides or {}), f"recipe {slug}")


def recipe_names() -> list[str]:
    """Slugs of all recipes that come with rollway."""
    return sorted(path.stem for path in folder("recipes").glob("*.yaml"))


def recipe_mapping(slug: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe's YAML with everything it extends merged under it."""
    if slug in seen:
        raise ConfigError(f"recipe {seen[0]} extends itself: {' -> '.join((*seen, slug))}; remove one `extends`")
    mapping = read_yaml(find("recipes", slug, ".yaml"))
    parent = mapping.get("extends")
    if parent is None:
        return mapping
    inherited = recipe_mapping(str(parent), (*seen, slug))
    for own in ("title", "paper", "status"):
        inherited.pop(own, None)
    return deep_merge(inherited, mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError with the line where it breaks."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: bytes that are no UTF-8, dates such as 2026-13-01.
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, not a mapping of settings")
    refuse_secrets(value, str(path))
    return value


def parse(model: type[M], value: Any, place: str) -> M:
    """Validates `value`; the error is one sentence per mistake, with the key and, for unknown keys, near names."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{place}: " + "; ".join(_sentence(model, e) for e in error.errors())) from None


def _sentence(model: type[BaseModel], error: Any) -> str:
    from difflib import get_close_matches

    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(error["loc"][-1]), _field_names(model), n=1, cutoff=0.6)
        return f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "; remove it")
    message = error["msg"].removeprefix("Value error, ")
    given = f" (given: {error['input']!r})" if not isinstance(error["input"], dict) else ""
    return f"`{key}`: {message}{given}" if key else message


def _field_names(model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema()
    names = set(schema.get("properties", {}))
    for definition in schema.get("$defs", {}).values():
        names |= set(definition.get("properties", {}))
    return sorted(names)
