"""Rollouts that the page shows token by token: whole groups, chosen by a hash of their prompt and never by result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollway.report.data import Run
from rollway.report.facts import Facts
from rollway.report.pack import UNKNOWN, numbers
from rollway.store.queries import rows as ask
from rollway.store.views import identifier, quote

MAX_RUNS = 40
MAX_ROUNDS = 40
MAX_PAIRS = 400
"""(run, round) pairs."""
MAX_ROLLOUTS = 16_000
MAX_TOKENS = 400_000
MAX_GROUP = 64
HEAD, TAIL = 1000, 500
"""Tokens of a long completion that are shown, from its start and from its end."""
TEXT_HEAD, TEXT_TAIL = 6000, 3000
"""The same in characters of its text."""
CHARACTERS = 4
"""A completion weighs as many tokens as it has, or one per so many characters of its text where that is more."""


@dataclass(frozen=True)
class Shown:
    """The chosen rollouts of one run, column by column, and the prompts they answer."""

    columns: dict[str, Any]
    prompts: set[str]
    token_ids: set[int]


def pick(catalog: duckdb.DuckDBPyConnection, runs: Sequence[Run], facts: Facts) -> list[str]:
    """Makes the temporary table `picked` (run, round, group_id); returns the runs whose rollouts are shown.

    Each shown round has an equal share of the limits, so what was long or frequent does not push out the rest. Groups
    come in the order of a hash of their prompt: the same prompts are seen in every round that asked them.
    """
    shown = [run for run in _first_of_each_name(runs) if run.run in facts.rounds][:MAX_RUNS]
    per_run = max(2, min(MAX_ROUNDS, MAX_PAIRS // max(1, len(shown))))
    known = {run.run for run in runs}
    wanted = []
    for run in shown:
        first = int(run.info["fork_round"]) if run.info.get("parent") in known else 0
        wanted += [(run.run, round) for round in spread([r for r in facts.rounds[run.run] if r >= first], per_run)]
    pairs = ", ".join(f"({quote(run)}, {round})" for run, round in wanted) or "(NULL, NULL)"
    tokens, rollouts = (limit // max(1, len(wanted)) for limit in (MAX_TOKENS, MAX_ROLLOUTS))
    catalog.execute(f"""CREATE TEMP TABLE picked AS
        WITH each AS (
            SELECT run, round, group_id, min(prompt_id) AS prompt, least(count(*), {MAX_GROUP}) AS n,
                sum(least(greatest(length, characters // {CHARACTERS}), {HEAD + TAIL})) AS tokens
            FROM facts WHERE (run, round) IN (VALUES {pairs}) GROUP BY run, round, group_id),
        ranked AS (
            SELECT run, round, group_id, sum(n) OVER w AS rollouts, sum(tokens) OVER w AS tokens, row_number() OVER w AS
            place FROM each
            WINDOW w AS (PARTITION BY run, round ORDER BY md5(prompt), prompt, group_id ROWS UNBOUNDED PRECEDING))
        SELECT run, round, group_id FROM ranked WHERE place = 1 OR (rollouts <= {rollouts} AND tokens <= {tokens})""")
    return [run.run for run in shown]


def read(catalog: duckdb.DuckDBPyConnection, results: Path, facts: Facts) -> dict[str, Shown]:
    """Run -> its picked rollouts, in order of round, prompt's hash, group and sample."""
    parts, tokens_advantage = _components(catalog), _token_advantages(catalog)
    files = _files(catalog, results)
    if not files:
        return {}
    table = catalog.sql(_query(files, facts.scorers)).to_arrow_table()
    runs = table.column("run").to_pylist()
    found, start = {}, 0
    for end in range(1, len(runs) + 1):
        if end == len(runs) or runs[end] != runs[start]:
            rows = table.slice(start, end - start)
            found[runs[start]] = _shown(rows, facts.scorers, parts.get(runs[start], {}), tokens_advantage)
            start = end
    return found


def _query(files: list[str], scorers: list[str]) -> str:
    paths = ", ".join(quote(path) for path in files)
    each = "".join(f", f.{identifier(name)}" for name in scorers)

    def cut(column: str) -> str:
        both = f"list_concat({column}[1:{HEAD}], {column}[-{TAIL}:])"
        return f"CASE WHEN len({column}) > {HEAD + TAIL} THEN {both} ELSE {column} END"

    return f"""
        WITH t AS (
            -- Files of older versions lack entropies: the empty table has the column wherever no file has it.
            SELECT *, regexp_extract(filename, '([^/]+)/r\\d+/p\\d+/[^/]+$', 1) AS of_run FROM (
                SELECT NULL::FLOAT[] AS entropy WHERE false UNION ALL BY NAME
                SELECT * FROM
                    read_parquet([{paths}], filename = true, union_by_name = true, hive_partitioning = false)))
        SELECT f.run, f.round, f.group_id, f.prompt_id, f.sample, f.rollout_id, f.source, f.policy_round, f.finish,
            f.length, f.reward, f.advantage, f.correct, f.slots{each},
            CASE WHEN length(t.text) > {TEXT_HEAD + TEXT_TAIL}
                THEN left(t.text, {TEXT_HEAD}) || '\n[...]\n' || right(t.text, {TEXT_TAIL}) ELSE t.text END AS text,
            {cut("t.tokens")} AS tokens, {cut("t.logprobs")} AS logprobs, {cut("t.train_mask")} AS train_mask,
            {cut("t.entropy")} AS entropy
        FROM facts AS f JOIN picked USING (run, round, group_id)
        JOIN t ON t.of_run = f.home AND t.rollout_id = f.rollout_id
        QUALIFY row_number() OVER (PARTITION BY f.run, f.round, f.group_id ORDER BY f.source = 'expert' DESC, f.sample,
            f.rollout_id) <= {MAX_GROUP}
        ORDER BY f.run, f.round, md5(f.prompt_id), f.prompt_id, f.group_id, f.sample, f.rollout_id"""


def _files(catalog: duckdb.DuckDBPyConnection, results: Path) -> list[str]:
    """Only the files that hold picked rollouts: a folder may have thousands."""
    query = "SELECT DISTINCT f.home, f.round FROM facts AS f JOIN picked USING (run, round, group_id) ORDER BY ALL"
    return [
        str(path)
        for home, round in ask(catalog, query)
        for path in sorted((results.resolve() / home / f"r{round:04d}").glob("p[0-9]*/rollouts-*.parquet"))
    ]


def _components(catalog: duckdb.DuckDBPyConnection) -> dict[str, dict[str, list[tuple[str, Any]]]]:
    """Run -> rollout -> (scorer: part, value), and what a scorer said went wrong as (scorer: error, message).

    Makes the temporary table `said` (run, rollout_id, scorer, components, error): every error, and the picked ones'
    components.
    """
    catalog.execute("""CREATE TEMP TABLE said AS
        WITH p AS (SELECT f.run, f.rollout_id FROM facts AS f JOIN picked USING (run, round, group_id))
        SELECT s.run, s.rollout_id, s.scorer, s.components, s.error, p.rollout_id IS NOT NULL AS picked
        FROM seen_scores AS s LEFT JOIN p ON s.run = p.run AND s.rollout_id = p.rollout_id
        WHERE s.error IS NOT NULL OR (p.rollout_id IS NOT NULL AND len(map_keys(s.components)) > 0)""")
    query = "SELECT run, rollout_id, scorer, components, error FROM said WHERE picked ORDER BY run, rollout_id, scorer"
    found: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for run, rollout, scorer, components, error in ask(catalog, query):
        parts = [(f"{scorer}: {name}", value) for name, value in (components or {}).items()]
        parts += [(f"{scorer}: error", str(error)[:500])] if error else []
        found.setdefault(run, {}).setdefault(rollout, []).extend(parts)
    return found


def _token_advantages(catalog: duckdb.DuckDBPyConnection) -> dict[tuple[str, int, str], list[float]]:
    """(run, round, rollout) -> advantage of each shown token, where the method's SQL gives one."""
    query = f"""SELECT b.run, b.round, b.rollout_id,
            CASE WHEN len(any_value(b.token_advantage)) > {HEAD + TAIL}
                THEN list_concat(any_value(b.token_advantage)[1:{HEAD}], any_value(b.token_advantage)[-{TAIL}:])
                ELSE any_value(b.token_advantage) END
        FROM seen_batch AS b JOIN facts AS f ON b.run = f.run AND b.round = f.round AND b.rollout_id = f.rollout_id
        JOIN picked AS p ON p.run = f.run AND p.round = f.round AND p.group_id = f.group_id
        WHERE b.token_advantage IS NOT NULL GROUP BY b.run, b.round, b.rollout_id"""
    return {(run, round, rollout): values for run, round, rollout, values in ask(catalog, query)}


def _shown(
    rows: pa.Table,
    scorers: list[str],
    parts: dict[str, list[tuple[str, Any]]],
    token_advantages: dict[tuple[str, int, str], list[float]],
) -> Shown:
    plain = ("round", "sample", "policy_round", "finish", "length", "source", "correct", "slots", "text")
    columns: dict[str, Any] = {name: rows.column(name).to_pylist() for name in plain}
    ids, prompts = rows.column("rollout_id").to_pylist(), rows.column("prompt_id").to_pylist()
    columns |= {"id": ids, "prompt": prompts, "group": rows.column("group_id").to_pylist()}
    columns |= {name: numbers(rows.column(name).to_pylist()) for name in ("reward", "advantage")}
    columns["scores"] = {
        name: numbers(rows.column(name).to_pylist()) for name in scorers if rows.column(name).null_count < rows.num_rows
    }
    columns["parts"] = {
        str(i): [[name, value if isinstance(value, str) else numbers([value])[0]] for name, value in parts[rollout]]
        for i, rollout in enumerate(ids)
        if rollout in parts
    }
    run, rounds = rows.column("run")[0].as_py() if rows.num_rows else "", columns["round"]
    columns["token_advantage"] = {
        str(i): numbers(token_advantages[run, rounds[i], rollout], 3)
        for i, rollout in enumerate(ids)
        if (run, rounds[i], rollout) in token_advantages
    }
    columns |= token_columns(rows)
    return Shown(columns, set(prompts), set(columns["tokens"]))


def token_columns(rows: pa.Table) -> dict[str, Any]:
    """Token lists of all rows end to end: `shown` says how many each row has. Log-probs and entropies in hundredths of
    a nat, UNKNOWN where nobody knows; `mask` and `entropy` are left out where they say nothing."""
    tokens = rows.column("tokens")
    shown = np.array([n or 0 for n in pc.list_value_length(tokens).to_pylist()], dtype=np.int64)
    found: dict[str, Any] = {"shown": shown.tolist(), "tokens": _flat(tokens).tolist()}
    found["logp"] = _hundredths(rows, "logprobs", shown)
    if "entropy" in rows.column_names and rows.column("entropy").null_count < rows.num_rows:
        found["entropy"] = _hundredths(rows, "entropy", shown)
    if "train_mask" in rows.column_names:
        mask = _flat(rows.column("train_mask"))
        if len(mask) == int(shown.sum()) and not mask.all():
            found["mask"] = mask.tolist()
    return found


def _hundredths(rows: pa.Table, name: str, shown: Any) -> list[int]:
    """Rows whose list has another length than their tokens (imported, none) are unknown throughout."""
    column = rows.column(name)
    lengths = np.array([n or 0 for n in pc.list_value_length(column).to_pylist()], dtype=np.int64)
    values = _flat(column).astype(np.float64)
    if not np.array_equal(lengths, shown):
        ends, whole = np.cumsum(lengths), np.full(int(shown.sum()), np.nan)
        starts = np.cumsum(shown) - shown
        for i in np.flatnonzero(lengths == shown):
            whole[starts[i] : starts[i] + shown[i]] = values[ends[i] - lengths[i] : ends[i]]
        values = whole
    limited = np.clip(np.nan_to_num(values * 100, nan=UNKNOWN, posinf=UNKNOWN, neginf=-UNKNOWN), -UNKNOWN, UNKNOWN)
    return np.rint(limited).astype(int).tolist()


def _flat(column: pa.ChunkedArray) -> Any:
    """Through DLPack: pyarrow's own way to NumPy imports pandas, which takes longer than all the rest here."""
    values = pc.list_flatten(column.combine_chunks())
    if values.null_count:
        values = pc.fill_null(values, np.nan if pa.types.is_floating(values.type) else 0)
    return np.from_dlpack(values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values)


def _first_of_each_name(runs: Sequence[Run]) -> list[Run]:
    """The first seed of every name before the second of any."""
    seen: dict[str, int] = {}
    ranks = {run.run: seen.update({run.name: seen.get(run.name, -1) + 1}) or seen[run.name] for run in runs}
    return sorted(runs, key=lambda run: ranks[run.run])


def spread(rounds: list[int], count: int) -> list[int]:
    """First, last, and evenly between: at most `count`."""
    if len(rounds) <= count:
        return rounds
    return sorted({rounds[round(i * (len(rounds) - 1) / (count - 1))] for i in range(count)})
