"""Pages and schemas that are made from the code are those in the repository."""

import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator, ValidationError

from rollway.config import deep_merge, load_experiment, objectives, recipe_names
from rollway.config.distillation import Divergence, Emphasis, Estimate, Importance
from rollway.config.experiment import Experiment, RunConfig
from rollway.config.recipes import Recipe, load_recipe, read_yaml
from rollway.config.reference import config_page, generated
from rollway.config.schema import json_schema
from rollway.config.training import TokenAdvantage
from rollway.store.reference import tables_page

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "config").glob("*.yaml")) + sorted((ROOT / "config/examples").glob("*.yaml"))
RECIPES = sorted((ROOT / "config/recipes").glob("*.yaml"))
PARTS = ("Ratio", "Gate", "Aggregate", "Kl", "AnyCorrectionPart", "Select", "Mixing", "Anchors", "Preference")


@pytest.mark.parametrize("name", sorted(generated()))
def test_pages_and_schemas_match_the_models(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == generated()[name], "run `make docs`"


def test_the_page_of_tables_matches_their_declaration() -> None:
    text = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert text == tables_page(), "run `make docs`"


def test_generated_pages_are_ascii() -> None:
    for name, text in {**generated(), "docs/tables.md": tables_page()}.items():
        assert text.isascii(), name


def test_links_inside_the_config_page_lead_somewhere() -> None:
    page = config_page()
    wanted = set(re.findall(r"\]\(#(\w+)\)", page))
    assert wanted <= set(re.findall(r'<a id="(\w+)">', page))


@pytest.mark.parametrize("model", [Experiment, RunConfig, Recipe])
def test_every_field_has_a_docstring(model: type[Experiment | Recipe]) -> None:
    schema = model.model_json_schema()
    silent = [
        f"{name}.{key}"
        for name, mapping in {model.__name__: schema, **schema["$defs"]}.items()
        for key, field in mapping.get("properties", {}).items()
        if not field.get("description") and not (key == "kind" and "const" in field)
    ]
    assert silent == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_repository_are_valid(path: Path) -> None:
    assert load_experiment(read_yaml(path)).resolved


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda path: path.stem)
def test_the_schemas_accept_the_files_of_the_repository(path: Path) -> None:
    validate("recipe" if path in RECIPES else "config", read_yaml(path))


def test_the_schemas_accept_parts_of_what_is_inherited() -> None:
    for aggregate in ("seq_sum_const", {"kind": "seq_sum_const"}, {"weights": "numerator"}):
        validate("recipe", {"train": {"objective": {"aggregate": aggregate, "gate": {"low": 0.1}}}})


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"projekt": "x"}, "projekt"),
        ({"tasks": {"spell": {"promt": "x"}}}, "promt"),
        ({"defaults": {"rollout": {"promts": 4}}}, "promts"),
        ({"defaults": {"train": {"objective": {"gait": "clip"}}}}, "gait"),
        ({"runs": {"grpo": {"train": {"objective": {"gate": {"kind": "clip", "lwo": 0.1}}}}}}, "lwo"),
        ({"runs": {"grpo": {"train": {"objective": {"gate": {"lwo": 0.1}}}}}}, "lwo"),
        ({"runs": {"grpo": {"train": {"objective": {"gate": "klip"}}}}}, "klip"),
        ({"runs": {"grpo": {"score": {"scorers": {"exact": {"kind": "exact", "stripp": True}}}}}}, "stripp"),
    ],
)
def test_the_schemas_refuse_what_is_misspelt(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        validate("config", deep_merge(read_yaml(ROOT / "config/config.yaml"), wrong))
    for part in (wrong.get("defaults"), wrong.get("runs", {}).get("grpo")):
        if part is not None:
            with pytest.raises(ValidationError, match=key):
                validate("recipe", deep_merge(read_yaml(ROOT / "config/recipes/grpo.yaml"), part))


def test_the_schema_still_requires_what_nothing_is_merged_under() -> None:
    config = read_yaml(ROOT / "config/config.yaml")
    del config["tasks"]["spell"]["source"]
    with pytest.raises(ValidationError, match="'source' is a required property"):
        validate("config", config)


def validate(model: str, value: dict[str, Any]) -> None:
    """Raises ValidationError at what the exported schema refuses."""
    validator(model).validate(value)


@cache
def validator(model: str) -> Draft202012Validator:
    schema = json_schema(model)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_page_a_title_and_a_paper(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.paper
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert f"config/recipes/{name}.yaml" in page
    for step in ("reward", "filter", "advantage", "weight", "route", "pair", "select"):
        part = getattr(recipe.curate, step)
        assert part is None or f"/{part.sql}.sql" in page, f"the page does not name the SQL of {step}"


@pytest.mark.parametrize("name", recipe_names())
def test_every_page_of_a_method_has_its_sections(name: str) -> None:
    """Equation -> code -> test -> measured, numbered deviations, and what is reconstructed."""
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    before, *after = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    sections = dict(zip(after[::2], after[1::2], strict=True))
    assert re.search(r"^    \S", before, re.MULTILINE), "no equation, indented by four"
    assert re.search(r"^\|.*\bcode\b.*\|$", before, re.MULTILINE), "no table from equation to code"
    assert "src/rollway/" in before or "workflow/sql/" in before, "the table leads to no code"
    assert "](../../tests/" in text, "no test is named"
    assert sections["Measured"].strip()
    assert re.match(r"\s*1\. ", sections["Deviations"]), "deviations are numbered"
    assert "reconstructed" in text.lower(), "the page does not say what is reconstructed"


def test_every_page_of_a_method_belongs_to_a_recipe() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == set(recipe_names())


def test_the_page_of_objectives_names_every_kind() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    unions = [getattr(objectives, part) for part in PARTS] + [
        TokenAdvantage,
        Divergence,
        Estimate,
        Importance,
        Emphasis,
    ]
    kinds = {kind for union in unions for model in _models(union) for kind in _kinds(model)}
    assert {"clip", "token_mean", "k3", "tis", "gae", "jsd", "topk"} <= kinds
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in page] == []


def _models(union: object) -> list[type]:
    found: list[type] = []
    for option in get_args(union):
        found += [option] if isinstance(option, type) and hasattr(option, "model_fields") else _models(option)
    return found


def _kinds(model: type) -> tuple[str, ...]:
    return get_args(model.model_fields["kind"].annotation)  # type: ignore[attr-defined]
