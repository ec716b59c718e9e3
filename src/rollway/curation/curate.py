"""From scored rollouts to the batch that is trained on. `curate` is public API."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from rollway.config.curation import CurateConfig, SqlPart
from rollway.config.scorers import ScoreConfig, TeacherScorer, unchecked
from rollway.curation import by_slices, prompt_batch
from rollway.curation import scored as relation
from rollway.curation.sql_file import Value, bind, read_step, steps
from rollway.curation.steps import Step, run_steps
from rollway.curation.summary import DERIVED_FROM, INPUT_COLUMNS, batch_figures, of_batch, of_pool, of_rollouts
from rollway.curation.teacher import Teacher
from rollway.errors import RollwayError
from rollway.store.parquet import conform
from rollway.store.tables import SPAN, TABLES, TEACHER_COLUMNS


@dataclass(frozen=True)
class Curated:
    """A round's batch and what there is to say about it."""

    batch: pa.Table
    metrics: dict[str, float]


def curate(
    scored: pa.Table,
    curate: CurateConfig,
    *,
    threads: int = 1,
    memory_limit: str | None = None,
    given: Mapping[str, Value] | None = None,
) -> pa.Table:
    """The batch of a method, in the columns of table `batch`; ordered by group_id, sample, rollout_id and slot.

    scored: rollout_id, the columns that the method's SQL names, and those of `curate.teacher`. given: values of the
    parameters round, seed and progress, for SQL that declares them. The result's bytes depend neither on the order of
    the rows nor on threads.

    Raises RollwayError that names the SQL file or the row, and the mend.
    """
    todo = plan(curate, given)
    with relation.connection(threads, memory_limit) as con:
        relation.load_arrow(con, scored, None if any(s.file.star for s in todo) else columns_needed(todo))
        relation.close_off(con)
        run_steps(con, todo)
        batch = _batch(con)
    return batch if curate.teacher is None else _with_columns(batch, scored)


def curate_files(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    curate: CurateConfig,
    *,
    round: int,
    prompts: list[Path] | None = None,
    threads: int = 1,
    memory_limit: str | None = None,
    given: Mapping[str, Value] | None = None,
) -> Curated:
    """As `curate`, from Parquet files of this round and, for replay, of earlier ones; reads no token column.

    scores: files of each scorer. prompts: files that are read only where the SQL names `task`, `answer` or `meta`.
    """
    kept: list[pa.Table] = []

    def keep(parts: Iterator[pa.Table]) -> None:
        kept[:] = parts

    metrics = curate_into(
        keep,
        rollouts,
        scores,
        score,
        curate,
        round=round,
        prompts=prompts,
        threads=threads,
        memory_limit=memory_limit,
        given=given,
    )
    return Curated(pa.concat_tables(kept).combine_chunks(), metrics)


def curate_into(
    take: Callable[[Iterator[pa.Table]], None],
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    curate: CurateConfig,
    *,
    round: int,
    prompts: list[Path] | None = None,
    threads: int = 1,
    memory_limit: str | None = None,
    given: Mapping[str, Value] | None = None,
    spill_in: Path | None = None,
    teacher_columns: Collection[str] | None = None,
) -> dict[str, float]:
    """As `curate_files`, for a batch that need not be in memory as a whole; returns the metrics.

    take: reads all the parts of the batch that it is given; what it made of them counts when this returns. It is called
    again, with all of them, where the first attempt ended in an error. spill_in: folder for what memory does not hold.
    teacher_columns: those that `curate.teacher` brings into the batch; None: all that its files have.
    """
    todo = plan(curate, given)
    taught: dict[str, float] = {}
    if curate.teacher is not None:
        take = Teacher.of(curate.teacher, scores.get(curate.teacher, []), teacher_columns).beside(take, taught)
    sliced = by_slices.curate(
        rollouts,
        scores,
        score,
        curate,
        todo,
        round=round,
        threads=threads,
        memory_limit=memory_limit,
        take=take,
    )
    if sliced is not None:
        return sliced | taught
    with relation.connection(threads, memory_limit, spill_in) as con:
        load_files(con, todo, rollouts, scores, score, round, prompts, curate.teacher)
        relation.close_off(con)
        loaded = _arrow(con, {*INPUT_COLUMNS, *prompt_batch.COLUMNS, DERIVED_FROM, *score.scorers})
        metrics = of_rollouts(loaded, list(score.scorers)).figures()
        asked, last = prompt_batch.groups_asked(prompt_batch.groups_of(loaded))
        metrics["passes"] = 1.0 + last
        del loaded
        run_steps(con, _until_filter(todo))
        # A fork without a filter of a round that its parent refilled trains on the prompt batch too, not on all passes.
        if curate.filter is not None or last > 0:
            alive = prompt_batch.groups_of(_arrow(con, set(prompt_batch.COLUMNS)))
            counts, late = prompt_batch.surplus(alive, asked)
            metrics |= counts
            if len(late):
                con.execute("DELETE FROM scored WHERE age = 0 AND group_id IN (SELECT unnest(?))", [late.to_pylist()])
        run_steps(con, [step for step in todo if step.file.step not in ("reward", "filter", "select")])
        if curate.select is not None:
            metrics |= of_pool(_arrow(con, {"advantage", "rollout_id"})).figures()
        run_steps(con, [step for step in todo if step.file.step == "select"])
        batch = _batch(con)
        take(iter([batch]))
        with_source = batch
        for name in (found := _arrow(con, {"source", "pass", DERIVED_FROM})).column_names:
            with_source = with_source.append_column(name, found.column(name))
        return metrics | taught | batch_figures(of_batch(with_source), metrics["rollouts"])


def count_groups(scored: pa.Table, curate: CurateConfig, *, given: Mapping[str, Value] | None = None) -> int:
    """How many groups of this round (age 0) survive the reward and filter steps; dynamic sampling refills the rest.

    A group of which only an expert's solution is left counts as lost: none of its rollouts is trained on.
    """
    todo = _until_filter(plan(curate, given))
    with relation.connection(1, None) as con:
        needed = columns_needed(todo) | {"source"}
        relation.load_arrow(con, scored, None if any(s.file.star for s in todo) else needed)
        return _surviving_groups(con, todo)


def count_groups_in_files(
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    curate: CurateConfig,
    *,
    round: int,
    prompts: list[Path] | None = None,
    threads: int = 1,
    memory_limit: str | None = None,
    given: Mapping[str, Value] | None = None,
) -> int:
    """As `count_groups`, from Parquet files."""
    todo = _until_filter(plan(curate, given))
    with relation.connection(threads, memory_limit) as con:
        load_files(con, todo, rollouts, scores, score, round, prompts, curate.teacher)
        return _surviving_groups(con, todo)


def given_values(curate: CurateConfig, *, round: int, seed: int) -> dict[str, Value]:
    """What the workflow knows: round, seed and, where `curate.horizon` is set, progress = min(1, round / horizon)."""
    values: dict[str, Value] = {"round": round, "seed": seed}
    if curate.horizon is not None:
        values["progress"] = min(1.0, round / curate.horizon)
    return values


def plan(curate: CurateConfig, given: Mapping[str, Value] | None = None) -> list[Step]:
    """The steps' files, checked, with their parameters bound. Raises RollwayError."""
    todo = []
    for name, part in steps(curate):
        file = read_step(name, part)
        todo.append(Step(file, bind(file, part, given or {})))
    reads_progress = any("progress" in s.file.params and s.file.acts("progress", s.values) for s in todo)
    sets_progress = any("progress" in part.params for _, part in steps(curate))
    if curate.horizon is not None and (not reads_progress or sets_progress):
        raise RollwayError("curate.horizon: has no effect, since no SQL file takes `progress` from it; remove it")
    return todo


def columns_named(curate: CurateConfig, given: Mapping[str, Value] | None = None) -> set[str] | None:
    """Columns of `scored` that the method's SQL names; None where it says `*` and so reads all of them."""
    todo = plan(curate, given)
    return None if any(s.file.star for s in todo) else columns_needed(todo)


def scorers_read(score: ScoreConfig, curate: CurateConfig, given: Mapping[str, Value] | None = None) -> ScoreConfig:
    """The scorers of the reward, of correctness, the teacher, and those that the SQL names, as `only` has them."""
    named = columns_named(curate, given)
    wanted = {*score.reward, score.correct, curate.teacher}
    return only(score, {n for n in score.scorers if n in wanted or named is None or n in named})


def only(score: ScoreConfig, used: set[str]) -> ScoreConfig:
    """Those scorers, without their `needs`: what is read of them is there. A teacher keeps its own, and brings the
    scorers that it names, since its contexts say nothing without them."""
    taught = {n for n in used if isinstance(score.scorers[n], TeacherScorer)}
    used = used | {need for n in taught for need in score.scorers[n].needs}
    kept = {n: unchecked(scorer) for n, scorer in score.scorers.items() if n in used}
    own = {n: scorer if n in taught else scorer.model_copy(update={"needs": []}) for n, scorer in kept.items()}
    return score.model_copy(update={"scorers": own})


def takes_progress(curate: CurateConfig) -> bool:
    """Whether a SQL file declares `progress` and the config does not set it: it then comes from `curate.horizon`."""
    return any("progress" in read_step(step, p).params and "progress" not in p.params for step, p in steps(curate))


def reads_reward(pair: SqlPart) -> bool:
    """Whether the file of `curate.pair` names the reward, or all columns."""
    file = read_step("pair", pair)
    return file.star or not file.names.isdisjoint(("reward", "reward_parts"))


def columns_needed(todo: list[Step]) -> set[str]:
    """Names that occur in the SQL, and the columns that go into the batch."""
    return set().union(*(s.file.names for s in todo), relation.CARRIED)


def load_files(
    con: duckdb.DuckDBPyConnection,
    todo: list[Step],
    rollouts: list[Path],
    scores: dict[str, list[Path]],
    score: ScoreConfig,
    round: int,
    prompts: list[Path] | None,
    teacher: str | None,
    more: Collection[str] = (),
) -> None:
    """Creates the table `scored` with the columns that the steps, the figures and the batch read, and `more`."""
    if not rollouts:
        raise RollwayError("no rollout files were given to curate; run the rollout stage first")
    needed = _needed(todo, score) | set(more)
    reads_prompts = needed & set(relation.FROM_PROMPTS)
    asks_teacher = teacher in score.scorers and "has_teacher" in needed
    derived = relation.scored_relation(
        *(con, rollouts, scores, score, round, prompts if reads_prompts else None), teacher if asks_teacher else None
    )
    relation.load_view(con, needed | ({DERIVED_FROM} if derived else set()), score)


def _needed(todo: list[Step], score: ScoreConfig) -> set[str]:
    """Columns that the steps, the metrics and the batch read."""
    needed = columns_needed(todo) | {*INPUT_COLUMNS, *prompt_batch.COLUMNS} | {name.lower() for name in score.scorers}
    return needed | (set(TABLES["rollouts"].scalar_names()) if any(s.file.star for s in todo) else set())


def _until_filter(todo: list[Step]) -> list[Step]:
    return [step for step in todo if step.file.step in ("reward", "filter")]


def _surviving_groups(con: duckdb.DuckDBPyConnection, todo: list[Step]) -> int:
    relation.close_off(con)
    run_steps(con, todo)
    columns = {row[0] for row in con.execute("DESCRIBE scored").fetchall()}
    if "group_id" not in columns:
        raise RollwayError("the scored rows have no column group_id, so their groups cannot be counted")
    fresh = "age = 0" if "age" in columns else "true"
    sampled = "source <> 'expert'" if "source" in columns else "true"
    return int(relation.one(con, f"SELECT count(DISTINCT group_id) FROM scored WHERE {fresh} AND {sampled}")[0])


def _arrow(con: duckdb.DuckDBPyConnection, columns: set[str]) -> pa.Table:
    """Those columns of the table `scored` that it has."""
    found = [row[0] for row in con.execute("DESCRIBE scored").fetchall() if row[0] in columns]
    return con.sql(f"SELECT {', '.join(map(relation.quoted, found))} FROM scored").to_arrow_table()


def _with_columns(batch: pa.Table, scored: pa.Table) -> pa.Table:
    """With the teacher columns that the scored rows bring."""
    found = [name for name in TEACHER_COLUMNS if name in scored.column_names]
    if not found:
        raise RollwayError(f"curate.teacher: the scored rows have none of the columns {', '.join(TEACHER_COLUMNS)}")
    at = pc.index_in(batch.column("rollout_id"), scored.column("rollout_id"))
    return conform(
        pa.Table.from_arrays([*batch.columns, *(scored[n].take(at) for n in found)], [*batch.column_names, *found]),
        "batch",
    )


def _batch(con: duckdb.DuckDBPyConnection) -> pa.Table:
    there = [row[0] for row in con.execute("DESCRIBE scored").fetchall()]
    schema = TABLES["batch"].schema([SPAN] if SPAN in there else [])
    present = [name for name in there if name in schema.names]
    rows = con.sql(f"SELECT {', '.join(present)} FROM scored").to_arrow_table()
    columns = []
    for field in schema:
        if field.name in present:
            columns.append(rows.column(field.name).cast(field.type).combine_chunks())
        elif field.name == "slot":
            columns.append(pa.repeat(pa.scalar(0, pa.int32()), rows.num_rows))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
