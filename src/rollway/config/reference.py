"""Pages of the docs that are made from the models: config reference, list of methods; and the JSON schemas.

`python -m rollway.config.reference` rewrites them, from the top folder of a checkout.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollway.config.curation import CURATE_STEPS
from rollway.config.experiment import Experiment, RunConfig
from rollway.config.recipes import Recipe, load_recipe, recipe_names
from rollway.config.schema import json_schema
from rollway.config.training import TrainConfig

Schema = dict[str, Any]

_MADE_BY = "<!-- Made by `python -m rollway.config.reference`; change the models in src/rollway/config instead. -->"
_CONFIG_INTRO = """\
# Config reference

Every key of `config.yaml`, of recipes and of the files in `config/examples`, made from the models in
[src/rollway/config](../src/rollway/config). Unknown keys are refused, and the message names the nearest known one.

`runs.<name>` holds what a run sets itself. Under it lie `defaults`, which take the same keys, and under those the
run's recipe, which takes the keys `extends`, `title`, `paper`, `status`, `axes`, `rollout`, `score`, `curate`
and `train`.
Mappings are merged key by key; a mapping whose `kind` or `sql` differs replaces the other whole. A part that has a
`kind` may be written as the kind's name alone inside `train.objective`, when its other keys keep their defaults.

Where a default is a mapping, only what differs from that mapping's own defaults is shown.
"""
_METHODS_INTRO = """\
# Methods

One recipe per method: `rollway recipes` prints this list. A method's SQL lies in [workflow/sql](../../workflow/sql),
its formulas in [src/rollway/objectives](../../src/rollway/objectives). Each page says which, what tests them, and in
what the recipe differs from the paper. Status: what a recipe still lacks against its specification. Benches: held-out
pass@1 after the [methods bench](../methods_bench.md) and after the [distillation bench](../distillation_bench.md), mean
over seeds with its 95 % interval; the two have other tasks and policies. Differences between methods are there, paired,
and none of these figures alone says that one method beats another. What neither bench ran was tried on the example
that its page names under "Measured", or not at all, and then the page says so.
"""
_AXES_INTRO = """\
## Distillation by three axes

The survey of on-policy distillation ([arXiv 2604.00626](https://arxiv.org/abs/2604.00626), version 1) sorts methods by
what they learn from (a teacher's log-probs, an outcome, self-play), of whom (a model whose log-probs are seen, one
whose text or verdict alone is, no other model), and how finely. Recipes say so in `axes`.
"""


def generated() -> dict[str, str]:
    """Path from the top folder -> text, of every file that is made from the config models."""
    return {
        "docs/config.md": config_page(),
        "docs/methods/index.md": methods_page(),
        "workflow/schemas/config.schema.json": schema_text("config"),
        "workflow/schemas/recipe.schema.json": schema_text("recipe"),
    }


def schema_text(model: str) -> str:
    """The file `workflow/schemas/{model}.schema.json`, as `rollway schema` prints it."""
    return json.dumps(json_schema(model), indent=1) + "\n"


def config_page() -> str:
    """docs/config.md: every field with type, default and meaning, a section per mapping, in the order of the YAML."""
    run = RunConfig.model_json_schema()
    seen: set[str] = set()
    sections = [*_sections(Experiment.model_json_schema(), "", seen), *_sections(run, "runs.<name>", seen)]
    return "\n".join([_MADE_BY, _CONFIG_INTRO, *sections])


def methods_page() -> str:
    """docs/methods/index.md: paper -> recipe -> parts -> status, and what the methods bench measured."""
    benches = [_measured(Path(f"docs/{bench}/outcomes.csv")) for bench in ("methods_bench", "distillation_bench")]
    lines = [
        _MADE_BY,
        _METHODS_INTRO,
        "| method | paper | recipe | SQL | objective | status | methods bench: pass@1 | distillation bench: pass@1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in recipe_names():
        recipe = load_recipe(name)
        cells = (
            f"[{recipe.title}]({name}.md)",
            _paper(recipe.paper),
            f"[{name}](../../config/recipes/{name}.yaml)",
            _sql_files(recipe),
            _objective(recipe.train),
            recipe.status,
            *(measured.get(name, "not run") for measured in benches),
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join([*lines, "", _AXES_INTRO, *_axes_table()]) + "\n"


def _axes_table() -> list[str]:
    """Every recipe that has `axes`, in their order, then by name."""
    placed = [(axes, name) for name in recipe_names() if (axes := load_recipe(name).axes) is not None]
    placed.sort(key=lambda pair: (*pair[0].model_dump().values(), pair[1]))
    rows = []
    for axes, name in placed:
        cells = [value.replace("_", " ") for value in axes.model_dump().values()]
        rows.append("| " + " | ".join([*cells, f"[{name}]({name}.md)"]) + " |")
    return ["| feedback | access | granularity | recipe |", "|---|---|---|---|", *rows]


def _measured(outcomes: Path) -> dict[str, str]:
    """Recipe -> final pass@1 with its interval, of the run that bears its name; empty where nothing was measured."""
    if not outcomes.exists():
        return {}
    with outcomes.open(encoding="utf-8", newline="") as file:
        return {
            row["name"]: f"{float(row['value']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"
            for row in csv.DictReader(file)
            if row["k"] == "1"
        }


def _paper(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _sql_files(recipe: Recipe) -> str:
    parts = [(step, getattr(recipe.curate, step)) for step in CURATE_STEPS]
    return ", ".join(f"{step} `{part.sql}`" for step, part in parts if part is not None) or "none"


def _objective(train: TrainConfig) -> str:
    objective = train.objective
    if objective.preference.kind != "none":
        return f"preference `{objective.preference.kind}`"
    named = {"ratio": objective.ratio, "gate": objective.gate, "aggregate": objective.aggregate}
    parts = [f"{name} `{part.kind}`" for name, part in named.items() if part is not None]
    if objective.kl.kind != "none":
        parts.append(f"kl `{objective.kl.kind}`")
    if objective.distill is not None:
        parts.append(f"distill `{objective.distill.divergence.kind}`, `{objective.distill.estimate.kind}`")
    if train.advantage is not None:
        parts.insert(0, f"token advantage `{train.advantage.kind}`")
    return ", ".join(parts)


# ---- the config reference, from JSON schemas


def _sections(schema: Schema, root: str, seen: set[str]) -> Iterator[str]:
    """One section per mapping that is not among `seen`, depth first, each at the first path that leads to it."""
    definitions = schema.get("$defs", {})

    def walk(model: Schema, path: str, name: str) -> Iterator[str]:
        yield _section(model, path, name, definitions)
        for key, field in _fields(model):
            for suffix, reference in _references(field):
                if reference not in seen:
                    seen.add(reference)
                    below = f"{path}.{key}{suffix}".lstrip(".")
                    yield from walk(definitions[reference], below, reference)

    yield from walk(schema, root, str(schema["title"]))


def _section(model: Schema, path: str, name: str, definitions: Schema) -> str:
    kinds = _kinds(model)
    title = f"`{path}`" if path else "The file"
    if kinds:
        title += " with " + " or ".join(f"`kind: {kind}`" for kind in kinds)
    lines = [f'<a id="{name}"></a>', "", f"## {title}", "", _meaning(model), ""]
    rows = [
        f"| `{key}` | {_cell(_type(field, definitions))} | {_default(key, field, model, definitions)} "
        f"| {_cell(_meaning(field, definitions))} |"
        for key, field in _fields(model)
        if not (key == "kind" and len(kinds) == 1)
    ]
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    else:
        lines += ["No further keys.", ""]
    return "\n".join(lines)


def _meaning(model: Schema, definitions: Schema | None = None) -> str:
    """The docstring on one line; for a field without one, that of the only mapping that it may hold."""
    text = model.get("description", "")
    if not text and definitions is not None:
        names = [name for _, name in _references(model)]
        text = definitions[names[0]].get("description", "").split("\n\n")[0] if len(names) == 1 else ""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def _fields(model: Schema) -> list[tuple[str, Schema]]:
    return list(model.get("properties", {}).items())


def _kinds(model: Schema) -> list[str]:
    kind = model.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else list(kind.get("enum", []))


def _references(field: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """(what the path gains, name of the definition) of every mapping that a field may hold."""
    if "$ref" in field:
        yield suffix, field["$ref"].removeprefix("#/$defs/")
    for option in [*field.get("anyOf", []), *field.get("oneOf", [])]:
        yield from _references(option, suffix)
    if isinstance(field.get("additionalProperties"), dict):
        yield from _references(field["additionalProperties"], f"{suffix}.<name>")
    if isinstance(field.get("items"), dict):
        yield from _references(field["items"], f"{suffix}[]")


def _type(field: Schema, definitions: Schema) -> str:
    options = [*field.get("anyOf", []), *field.get("oneOf", [])]
    if options:
        kinds = {kind for _, name in _references(field) for kind in _kinds(definitions[name])}
        longer = [option for option in options if not _names_kinds(option, kinds)]
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in longer))
    if "$ref" in field:
        name = field["$ref"].removeprefix("#/$defs/")
        return " or ".join(f"[`{kind}`](#{name})" for kind in _kinds(definitions[name])) or f"[mapping](#{name})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    match field.get("type"):
        case "array" if "prefixItems" in field:
            return "list of " + " and ".join(_type(item, definitions) for item in field["prefixItems"])
        case "array":
            return f"list of {_type(field.get('items', {}), definitions)}"
        case "object" if isinstance(field.get("additionalProperties"), dict):
            return f"mapping of names to {_type(field['additionalProperties'], definitions)}"
        case "object":
            return "mapping"
        case "null":
            return "null"
        case None:
            return "anything"
        case name:
            words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
            return words[name] + _limits(field)


def _names_kinds(option: Schema, kinds: set[str]) -> bool:
    """Whether an option only allows a kind's name in place of its mapping."""
    values = {option["const"]} if "const" in option else set(option.get("enum", []))
    return bool(values) and values <= kinds


def _limits(field: Schema) -> str:
    marks = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{mark} {field[name]:g}" for name, mark in marks.items() if name in field]
    return (" " + ", ".join(limits)) if limits else ""


def _default(key: str, field: Schema, model: Schema, definitions: Schema) -> str:
    if key in model.get("required", []):
        return "needed"
    if "default" not in field:
        return ""
    return _cell(f"`{_compact(field['default'], field, definitions)}`")


def _compact(value: Any, field: Schema, definitions: Schema) -> str:
    """YAML flow style; of a mapping only what differs from its own defaults."""
    if not isinstance(value, dict):
        return "null" if value is None else _flow(value)
    kind = value.get("kind")
    for suffix, name in _references(field):
        model = definitions[name]
        if suffix:
            break
        if kind is None or kind in _kinds(model):
            own = {k: f.get("default") for k, f in _fields(model)}
            differs = {k: v for k, v in value.items() if k != "kind" and own.get(k) != v}
            if kind is not None:
                return _flow({"kind": kind, **differs}) if differs else str(kind)
            return _flow(differs)
    items = field.get("additionalProperties")
    if isinstance(items, dict):
        return "{" + ", ".join(f"{key}: {_compact(item, items, definitions)}" for key, item in value.items()) + "}"
    return _flow(value)


def _flow(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_flow, value)) + "]"
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case float():
            return f"{value:g}"
        case str():
            return json.dumps(value) if value == "" or not re.fullmatch(r"[\w.:/{}|-]+", value) else value
        case _:
            return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(root: Path) -> None:
    """Rewrites every generated file under `root`."""
    for name, text in generated().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main(Path.cwd())
