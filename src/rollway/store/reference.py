"""The page of the docs that describes every table, view and macro. `python -m rollway.store.reference` rewrites it."""

from pathlib import Path

import pyarrow as pa

from rollway.store.tables import TABLES, Table
from rollway.store.views import View, documented

_INTRO = """\
<!-- Made by `python -m rollway.store.reference`; change src/rollway/store/tables.py or workflow/sql/views instead. -->
# Tables

Declared once, in [src/rollway/store/tables.py](../src/rollway/store/tables.py); the Parquet files, the views of
`rollway sql` and this page are made from there. How to ask questions: [sql.md](sql.md).

| table | files |
|---|---|
| `prompts` | `results/tasks/{task}/{split}.parquet` |
| `rollouts` | `results/{run}/r{round}/p{pass}/rollouts-{shard}.parquet` |
| `scores` | `results/{run}/r{round}/p{pass}/scores/{scorer}-{shard}.parquet` |
| `batch` | `results/{run}/r{round}/batch.parquet` |
| `evals` | `results/{run}/r{round}/evals.parquet` |
| `teacher_checks` | `results/{run}/r{round}/teacher-{scorer}.parquet` |
| `metrics` | `results/{run}/r{round}/{metrics,curate,evals,teacher-{scorer},discriminator-{scorer}}.json` |

Files hold neither the run's name nor a path, time or host. The views add `run`, and `round` where the file has none,
from the path. Log-probs and entropies are in nats, lengths in tokens.
"""
_METRICS = """\
## `metrics`

What every stage measured. The JSON files hold `{"round", "stage", "metrics": [{"step", "name", "value"}]}`.

| column | type | meaning |
|---|---|---|
| `run` | string | from the path; `reward_models/NAME` for a reward model |
| `round` | int32, may be null | round that was trained, curated or evaluated; null for a reward model |
| `stage` | string | train, curate, evaluate, check_teacher, discriminator or reward_model |
| `step` | int32 | optimiser step since the warm-up; 0 for curate, evaluate and check_teacher |
| `name` | string | what was measured |
| `value` | double, may be null | null where there is no finite number |
"""
_VIEWS_INTRO = """\
## Views and macros

Made from the files in [workflow/sql/views](../workflow/sql/views). Beside them, `scored` joins rollouts with their
scores and with the batch. `seen_rollouts`, `seen_scores`, `seen_batch`, `seen_evals` and `seen_metrics` give a fork the
rounds of its parent; `lineage` says which rounds those are. `rollway sql` without a query lists every view with its
columns.
"""


def tables_page() -> str:
    """docs/tables.md."""
    parts = [_INTRO, *map(_table, TABLES.values()), _METRICS, _VIEWS_INTRO]
    parts += [_view(view) for view in documented()]
    return "\n".join(parts)


def _view(view: View) -> str:
    return f"### `{view.name}` ({view.kind})\n\n{view.meaning}\n\n```sql\n{view.example}\n```\n"


def _table(table: Table) -> str:
    lines = [f"## `{table.name}`", "", f"{table.meaning} Key: {', '.join(f'`{name}`' for name in table.key)}.", ""]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    for column in table.columns:
        null = ", may be null" if column.nullable else ""
        lines.append(f"| `{column.name}` | {_type(column.type)}{null} | {column.meaning.replace('|', chr(92) + '|')} |")
    for column in table.optional:
        lines.append(f"| `{column.name}` | {_type(column.type)}, in some files, may be null | {column.meaning} |")
    return "\n".join(lines) + "\n"


def _type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    if pa.types.is_map(kind):
        return f"map from {_type(kind.key_type)} to {_type(kind.item_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(f"{f.name} {_type(f.type)}" for f in kind) + "}"
    return str(kind)


def main(root: Path) -> None:
    """Rewrites docs/tables.md under `root`."""
    (root / "docs" / "tables.md").write_text(tables_page(), encoding="utf-8")
    print("docs/tables.md")


if __name__ == "__main__":
    main(Path.cwd())
