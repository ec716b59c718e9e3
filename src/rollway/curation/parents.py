"""Which rollouts a derived pass is made of (`rollout.derive`): SQL over the scored rows of a round's earlier passes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rollway.config.curation import SqlPart
from rollway.config.rollouts import Derive
from rollway.config.scorers import ScoreConfig
from rollway.curation import scored as relation
from rollway.curation.curate import load_files, only
from rollway.curation.dry_run import no_rows
from rollway.curation.sql_file import Value, bind, read_step
from rollway.curation.steps import Step, run_steps

COLUMNS = ("rollout_id", "group_id", "prompt_id", "sample", "correct")
"""Columns of `scored` that a derived pass reads, beside the scorers'."""


@dataclass(frozen=True)
class Parents:
    """What a derived pass is made of, in the order of `scored`."""

    scored: pa.Table
    """COLUMNS and the scorers' rewards of all rows of the earlier passes."""
    chosen: list[str]
    """rollout_id of the parents."""


def steps(reward: SqlPart | None, parents: SqlPart, given: Mapping[str, Value] | None = None) -> list[Step]:
    """The files, checked, with their parameters bound. Raises RollwayError."""
    parts = [("reward", reward), ("parents", parents)]
    files = [(read_step(name, part), part) for name, part in parts if part is not None]
    return [Step(file, bind(file, part, given or {})) for file, part in files]


def takes_progress(reward: SqlPart | None, parents: SqlPart) -> bool:
    """Whether one of the files takes `progress` from `curate.horizon`."""
    parts = [("reward", reward), ("parents", parents)]
    return any("progress" in read_step(n, p).params and "progress" not in p.params for n, p in parts if p is not None)


def scorers_of(
    score: ScoreConfig, reward: SqlPart | None, derive: Derive, given: Mapping[str, Value] | None = None
) -> ScoreConfig:
    """The scorers of the reward, of correctness, and those that the SQL or a context names."""
    todo = steps(reward, derive.parents, given)
    star = any(step.file.star for step in todo)
    named = set().union(*(step.file.names for step in todo))
    wanted = {*score.reward, score.correct}
    wanted |= {n for n in score.scorers if n in named or any(c.names(rf"scores\.{n}") for c in derive.context)}
    return only(score, {n for n in score.scorers if n in wanted or star})


def check(score: ScoreConfig, reward: SqlPart | None, derive: Derive, given: Mapping[str, Value] | None = None) -> None:
    """Tries the files on no rows. Raises RollwayError that names the file and the mend."""
    read = scorers_of(score, reward, derive, given)
    with relation.connection(1, None) as con:
        relation.load_arrow(con, no_rows(read, derived=True), None)
        relation.close_off(con)
        run_steps(con, steps(reward, derive.parents, given), no_rows=True)


def parents_in_files(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    reward: SqlPart | None,
    derive: Derive,
    *,
    round: int,
    prompts: list[Path],
    given: Mapping[str, Value] | None = None,
    threads: int = 1,
) -> Parents:
    """From the Parquet files of the round's earlier passes. Raises RollwayError that names the SQL file and the
    mend."""
    todo = steps(reward, derive.parents, given)
    with relation.connection(threads, None) as con:
        load_files(con, todo, rollouts, scores, score, round, prompts, None, COLUMNS)
        relation.close_off(con)
        names = [*COLUMNS, *score.scorers]
        whole = con.sql(f"SELECT {', '.join(map(relation.quoted, names))} FROM scored").to_arrow_table()
        run_steps(con, todo)
        chosen = con.sql("SELECT rollout_id FROM scored").to_arrow_table().column("rollout_id").to_pylist()
    return Parents(whole, chosen)
