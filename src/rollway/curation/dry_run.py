"""A method's SQL on no rows: what DuckDB can say of it before any job has run."""

from collections.abc import Mapping

import pyarrow as pa

from rollway.config.curation import CurateConfig
from rollway.config.scorers import ScoreConfig
from rollway.curation import scored as relation
from rollway.curation.curate import plan
from rollway.curation.sql_file import Value
from rollway.curation.steps import run_steps
from rollway.store.tables import TABLES


def dry_run(
    curate: CurateConfig, score: ScoreConfig, given: Mapping[str, Value] | None = None, *, derived: bool = False
) -> frozenset[str]:
    """Runs the steps on an empty `scored` with all the columns that a run with these scorers has.

    derived: whether it has derived passes. Returns the columns that it then has.
    Raises RollwayError that names the SQL file and the mend: an unknown column (a scorer that is not there), a syntax
    error, a result without its columns or of a wrong type.
    """
    todo = plan(curate, given)
    with relation.connection(1, None) as con:
        relation.load_arrow(con, no_rows(score, curate.teacher is not None, derived), None)
        relation.close_off(con)
        run_steps(con, todo, no_rows=True)
        return frozenset(row[0] for row in con.execute("DESCRIBE scored").fetchall())


def no_rows(score: ScoreConfig, taught: bool = False, derived: bool = False) -> pa.Table:
    """`scored` as `scored_relation` makes it, without rows."""
    rollouts = TABLES["rollouts"]
    fields = [rollouts.schema().field(name) for name in rollouts.scalar_names()]
    fields += [pa.field(name, pa.float64()) for name in (*score.scorers, "mean_logprob", "reward")]
    fields += [pa.field("correct", pa.bool_()), pa.field("age", pa.int32())]
    fields += [pa.field("prefix_length", pa.int32())] if derived else []
    fields += [pa.field("has_teacher", pa.bool_())] if taught else []
    fields += [pa.field(name, pa.string()) for name in ("text_hash", *relation.FROM_PROMPTS)]
    part = pa.struct([("weight", pa.float64()), ("reward", pa.float64())])
    # Not `empty_table`, which imports pandas: half a second of every `snakemake -n`.
    return pa.Table.from_batches([], pa.schema([*fields, pa.field("reward_parts", pa.list_(part))]))
