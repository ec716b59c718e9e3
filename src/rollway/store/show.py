"""`rollway show`: one rollout, complete, for a person's eyes."""

import io
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollway.errors import RollwayError
from rollway.printable import printable, printable_lines
from rollway.store.catalog import with_catalog
from rollway.store.lineage import read_runs
from rollway.store.queries import rows
from rollway.store.token_colours import SCALES, coloured, legend, values_of

MAX_TOKENS = 400


def show(
    results: Path,
    rollout_id: str,
    *,
    colour: bool = False,
    width: int = 110,
    by: str | None = None,
    run: str | None = None,
) -> str:
    """The rollout with its prompt, completion, scores, advantage, tokens with log-probs (nats), and the siblings of its
    group.

    `colour`: ANSI colours for a terminal. `by`: what the completion's tokens are coloured by, one of logprob, entropy,
    advantage and ratio (which loads the policy one round on). `run`: as this run sees it. Raises RollwayError that
    suggests near ids, and where the figure asked for is not stored.
    """
    row, prompt, scores, batch, siblings = with_catalog(results, lambda catalog: _read(catalog, rollout_id, run))
    own = [entry for entry in batch if entry["run"] == row["run"]]
    values = _values(results, by, row, own or batch)
    tokenizer = _tokenizer(results, row)
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=colour,
        no_color=not colour,
        color_system="truecolor" if colour else None,
        width=width,
        highlight=False,
    )
    _heading(console, row)
    _conversation(console, prompt)
    _completion(console, row, tokenizer if colour else None, by or "logprob", values)
    _verdicts(console, scores, batch)
    console.print(_tokens(row, tokenizer, by, values))
    console.print(_siblings(siblings, rollout_id))
    return buffer.getvalue()


def _read(
    connection: duckdb.DuckDBPyConnection, rollout_id: str, run: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The rollout, its prompt, its scores, its rows in batches, and its group."""
    row = _rollout(connection, rollout_id, run)
    prompt = _one(connection, "SELECT * FROM prompts WHERE prompt_id = ?", row["prompt_id"])
    scores = _all(connection, "SELECT * FROM scores WHERE rollout_id = ? ORDER BY run, scorer", rollout_id)
    batch = _all(connection, "SELECT * FROM batch WHERE rollout_id = ? ORDER BY run, round, slot", rollout_id)
    siblings = _all(
        connection,
        """SELECT s.rollout_id, s.sample, s.reward, s.advantage, s.length, s.finish, s.text
        FROM scored AS s WHERE s.run = ? AND s.round = ? AND s.group_id = ? ORDER BY s.sample""",
        *(row["run"], row["round"], row["group_id"]),
    )
    return row, prompt, scores, batch, siblings


def _values(results: Path, by: str | None, row: dict[str, Any], batch: list[dict[str, Any]]) -> list[float]:
    if by == "ratio":
        from rollway.comparison.token_ratio import token_ratios

        return token_ratios(results, row["run"], row)
    return values_of(by or "logprob", row, batch)


def _completion(console: Console, row: dict[str, Any], tokenizer: Any, by: str, values: list[float]) -> None:
    """The text; in colour where a tokenizer says which part of it each token is."""
    console.print(Text("completion", style="bold"))
    if tokenizer is None or not row["tokens"]:
        console.print(Text(printable_lines(row["text"])))
        return
    console.print(coloured(by, row["tokens"], values, tokenizer))
    console.print(legend(by))


def _rollout(connection: duckdb.DuckDBPyConnection, rollout_id: str, run: str | None) -> dict[str, Any]:
    query = (
        "SELECT * FROM seen_rollouts WHERE rollout_id = ? AND (run = ? OR ? IS NULL) ORDER BY home <> run, run LIMIT 1"
    )
    row = _one(connection, query, rollout_id, run, run)
    if row is None:
        there = rows(connection, "SELECT DISTINCT run FROM seen_rollouts WHERE rollout_id = ? ORDER BY 1", rollout_id)
        if there:
            raise RollwayError(
                f"show: run {run} has no rollout {rollout_id!r}; it is in {', '.join(r[0] for r in there)}"
            )
        known = [r[0] for r in rows(connection, "SELECT rollout_id FROM rollouts LIMIT 100000")]
        near = get_close_matches(rollout_id, known, n=3, cutoff=0.5) or known[:3]
        hint = f"; there are, for example, {', '.join(near)}" if near else "; no rollouts have been written yet"
        raise RollwayError(f"show: no rollout {rollout_id!r}{hint}")
    return row


def _all(connection: duckdb.DuckDBPyConnection, query: str, *values: Any) -> list[dict[str, Any]]:
    cursor = connection.execute(query, list(values))
    names = [column[0] for column in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _one(connection: duckdb.DuckDBPyConnection, query: str, *values: Any) -> dict[str, Any] | None:
    return next(iter(_all(connection, query, *values)), None)


def _heading(console: Console, row: dict[str, Any]) -> None:
    console.print(Text(f"rollout {row['rollout_id']}", style="bold"))
    facts = (
        "run",
        "round",
        "pass",
        "group_id",
        "sample",
        "source",
        "policy",
        "policy_round",
        "engine",
        "finish",
        "length",
    )
    console.print(Text("  ".join(f"{name} {printable(str(row[name]))}" for name in facts), style="dim"))
    if row["home"] != row["run"]:
        console.print(Text(printable(f"taken over from {row['home']}, which {row['run']} forks"), style="dim"))
    console.print(Text(f"sampling {printable(row['sampling'])}", style="dim"))


def _conversation(console: Console, prompt: dict[str, Any] | None) -> None:
    if prompt is None:
        console.print(Text("its prompt is not in results/tasks", style="bold"))
    else:
        named = (("prompt", "prompt_id"), ("task", "task"), ("split", "split"))
        console.print(Text("  ".join(f"{name} {printable(str(prompt[key]))}" for name, key in named), style="bold"))
        for message in json.loads(prompt["messages"]):
            console.print(
                Text(f"[{printable(str(message['role']))}] ", style="dim")
                + Text(printable_lines(str(message["content"])))
            )
        if prompt["answer"] is not None:
            console.print(Text("answer ", style="dim") + Text(printable_lines(prompt["answer"])))


def _verdicts(console: Console, scores: list[dict[str, Any]], batch: list[dict[str, Any]]) -> None:
    console.print(Text("scores", style="bold"))
    for score in scores:
        parts = "".join(f"  {printable(name)} {value:.4g}" for name, value in (score["components"] or {}).items())
        error = f"  error: {printable(score['error'])}" if score["error"] else ""
        console.print(Text(f"  {printable(score['scorer'])} {score['reward']:.4g}{parts}{error}"))
    if not scores:
        console.print(Text("  not scored yet"))
    for entry in batch:
        facts = [f"run {entry['run']} round {entry['round']} slot {entry['slot']}"]
        facts += [
            f"{name} {entry[name]:.4g}" if isinstance(entry[name], float) else f"{name} {entry[name]}"
            for name in ("advantage", "weight", "reward", "correct", "route", "pair_id", "role")
            if entry[name] is not None
        ]
        console.print(Text(printable("  batch: " + "  ".join(facts))))
    if not batch:
        console.print(Text("  in no batch (dropped by curation, or not curated yet)"))


def _tokens(row: dict[str, Any], tokenizer: Any, by: str | None, values: list[float]) -> Table:
    table = Table(
        title=f"tokens (log-probs in nats){'' if tokenizer else '; no tokenizer found, ids only'}", title_justify="left"
    )
    more = [by] if by in ("advantage", "ratio") else []
    for name in ("position", "id", "text", "logprob", "prob", "entropy", "author", "trained", *more):
        table.add_column(name, justify="left" if name in ("text", "author", "trained") else "right")
    logprobs, entropy = row["logprobs"] or [], row["entropy"] or []
    authors = {i: s["author"] for s in row["segments"] or [] for i in range(s["start"], s["end"])}
    for position, token in enumerate(row["tokens"][:MAX_TOKENS]):
        logprob = logprobs[position] if position < len(logprobs) else float("nan")
        table.add_row(
            str(position),
            str(token),
            Text(
                printable(tokenizer.decode([token], skip_special_tokens=False)) if tokenizer else "",
                style=SCALES[by or "logprob"].style(values[position]),
            ),
            f"{logprob:.4f}",
            f"{2.718281828459045**logprob:.4f}",
            f"{entropy[position]:.4f}" if position < len(entropy) else "",
            printable(str(authors.get(position, ""))),
            "yes" if row["train_mask"][position] else "no",
            *(f"{values[position]:.4f}" for _ in more),
        )
    if len(row["tokens"]) > MAX_TOKENS:
        table.caption = f"{len(row['tokens']) - MAX_TOKENS} more tokens not shown"
    return table


def _siblings(rows: list[dict[str, Any]], rollout_id: str) -> Table:
    table = Table(title="its group", title_justify="left")
    ids = max((len(row["rollout_id"]) for row in rows), default=0)
    for name in ("sample", "rollout_id", "reward", "advantage", "length", "finish", "text"):
        table.add_column(
            name, overflow="ellipsis", no_wrap=True, min_width=min(ids, 40) if name == "rollout_id" else None
        )
    for row in rows:
        figures = ["" if row[name] is None else f"{row[name]:.4g}" for name in ("reward", "advantage")]
        cells = [str(row["sample"]), row["rollout_id"], *figures, str(row["length"]), row["finish"], row["text"][:200]]
        table.add_row(*(Text(printable(c)) for c in cells), style="bold" if row["rollout_id"] == rollout_id else "")
    return table


def _tokenizer(results: Path, row: dict[str, Any]) -> Any:
    """The tokenizer beside the policy's weights or the run's warm-up; None where neither is there (pruned, remote)."""
    info = read_runs(results).get(row["home"], {})
    warmups = [str(info.get("warmup", "")), f"{info.get('warmup')}-s{info.get('seed')}"]
    folders = [results / row["home"] / f"r{row['policy_round']:04d}", *(results / "warmups" / name for name in warmups)]
    for folder in folders:
        manifest = folder / "policy.json"
        if not manifest.is_file():
            continue
        for policy in json.loads(manifest.read_text(encoding="utf-8"))["policies"].values():
            path = folder / (policy.get("folder") or "") / "tokenizer.json"
            if path.is_file():
                from tokenizers import Tokenizer

                return Tokenizer.from_file(str(path))
    return None
