"""What is fuzzed: for each target the inputs, and a check that is true where one is taken, false where it is refused in
a sentence (RollwayError), and raises otherwise."""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import regex
import yaml
from hypothesis import strategies as st

from fuzz.scratch import ROOT, scratch, written
from fuzz.sql import (
    QUERIES,
    WORDS,
    a_header_is_read,
    a_question_is_answered,
    a_text_stays_a_text,
    sql_curates,
    sql_headers,
    sql_text_is_read,
    sql_texts,
)
from fuzz.values import injured_bytes, injured_text, injured_tree, joined, trees
from rollway import tasks
from rollway.config import load_experiment, recipe_names
from rollway.config.recipes import Recipe, parse, read_yaml, recipe_mapping
from rollway.config.scorers import ExactScorer, FormatScorer, LengthScorer, MathVerifyScorer
from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.runtime import specs
from rollway.scorers import Row, read_answer, score
from rollway.scorers.judge import read_verdict
from rollway.scorers.limited import _Worker
from rollway.store import parquet
from rollway.store.foreign import FORMATS
from rollway.store.importing import FIELDS, import_rollouts
from rollway.store.queries import FORMATS as OUTPUTS
from rollway.tasks.extract import boxed, extractor
from rollway.template import render
from store.synthetic import make_results

SECONDS = 10.0
"""What a single input may take at most: one that takes longer is a hang."""


@dataclass(frozen=True)
class Target:
    name: str
    meaning: str
    inputs: Callable[[], st.SearchStrategy[Any]]
    check: Callable[[Any], bool]

    def tried(self, value: Any) -> bool:
        began = time.process_time()
        try:
            return self.check(value)
        except RollwayError as error:
            _a_sentence(error)
            return False
        finally:
            spent = time.process_time() - began
            assert spent < SECONDS, f"{spent:.1f} s"


def _a_sentence(error: RollwayError) -> None:
    """A message for people: something, no traceback, and text that a terminal can print."""
    text = str(error)
    assert text.strip()
    assert "Traceback" not in text
    text.encode("utf-8", "replace")


# --- configuration ---------------------------------------------------------------------------------------------------


@cache
def configs() -> list[dict[str, Any]]:
    files = [ROOT / "config/config.yaml", *sorted((ROOT / "config/examples").glob("*.yaml"))]
    return [yaml.safe_load(path.read_text()) for path in files]


@cache
def key_names() -> list[str]:
    def properties(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            found = set(schema.get("properties", {})) if isinstance(schema.get("properties"), dict) else set()
            return found.union(*map(properties, schema.values()))
        return set().union(*map(properties, schema)) if isinstance(schema, list) else set()

    from rollway.config.experiment import Experiment, RunConfig

    return sorted(properties(Experiment.model_json_schema()) | properties(RunConfig.model_json_schema()))


def config_is_read(mapping: Any) -> bool:
    experiment = load_experiment(mapping)
    for name in experiment.resolved:
        experiment.settings(name, 0)
    return True


def yaml_is_read(content: bytes) -> bool:
    return config_is_read(read_yaml(written("config.yaml", content)))


def recipe_is_read(mapping: Any) -> bool:
    return bool(parse(Recipe, mapping, "recipe"))


def spec_is_read(given: tuple[str, str]) -> bool:
    return bool(specs.load(*given))


@cache
def whole_specs() -> list[tuple[str, Any]]:
    """One of each stage, as the default project's jobs get them."""
    from types import SimpleNamespace

    from rollway.runtime.plan import Plan

    plan = Plan(load_experiment(copy.deepcopy(configs()[0])))
    run = next(iter(plan.runs))
    at = SimpleNamespace(run=run, round="0000", next="0001", p="0", shard="000", scorer="exact", task="spell")
    made = [("curate", plan.curate_spec(at)), ("train", plan.train_spec(at)), ("score", plan.score_spec(at))]
    return [(stage, json.loads(text)) for stage, text in made]


@st.composite
def stage_specs(draw: st.DrawFn) -> tuple[str, str]:
    stage, whole = draw(st.sampled_from(whole_specs()))
    if draw(st.booleans()):
        return stage, draw(injured_text(json.dumps(whole), ["{", "}", "[" * 2000, "NaN", "1e999", "null", '"']))
    return stage, json.dumps(draw(injured_tree(whole, key_names())), default=str)


# --- files from elsewhere --------------------------------------------------------------------------------------------

_SAID = {"f": "stop", "id": "q", "g": 7}
WHOLE_RECORDS: list[dict[str, Any]] = [
    {"p": "2+2=", "c": "4", "r": 1.0, "a": "4", "t": [1, 2], "l": [-0.1, -0.2], "m": [1, 0], **_SAID},
    {"p": [{"role": "user", "content": "hi"}], "c": "é\n", "r": False, "a": None, "t": [], "l": [], "m": [], **_SAID},
    {"p": "2+2=", "c": [{"role": "assistant", "content": "5"}], "r": None, "a": 4, "t": None, "l": None, "m": None}
    | _SAID,
]
COLUMNS = {"prompt": "p", "completion": "c", "reward": "r", "answer": "a", "tokens": "t", "logprobs": "l"}
OTHERS = {"train_mask": "m", "group": "g", "finish": "f", "policy": "p.x", "prompt_id": "id", "prompt_tokens": "t"}


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, str]:
    chosen = draw(st.sets(st.sampled_from(sorted(COLUMNS)), min_size=1)) | {"prompt", "completion"}
    mapping = {field: COLUMNS[field] for field in sorted(chosen)}
    if draw(st.integers(0, 3)) == 0:
        mapping |= {f: OTHERS[f] for f in sorted(draw(st.sets(st.sampled_from(sorted(OTHERS)), max_size=1)))}
    if draw(st.integers(0, 9)) == 0:
        mapping[draw(st.sampled_from(sorted(FIELDS)) | st.text(max_size=6))] = draw(st.text(max_size=6))
    return mapping


@st.composite
def json_lines(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    names = [*"pcratlmgf", "role", "content", "tool_calls", "id"]
    whole = st.sampled_from(WHOLE_RECORDS)
    records = draw(st.lists(whole, min_size=1, max_size=3))
    if draw(st.booleans()):
        records.append(draw(whole.flatmap(lambda r: injured_tree(r, names)) | trees(st.sampled_from(names))))
    content = "\n".join(json.dumps(record, default=str) for record in records).encode()
    if draw(st.integers(0, 3)) == 0:
        content = draw(injured_bytes(content))
    return content, draw(mappings())


def lines_are_imported(given: tuple[bytes, dict[str, str]]) -> bool:
    content, mapping = given
    return _imported(written("rollouts.jsonl", content), mapping)


def _imported(path: Path, mapping: dict[str, str], tool: str | None = None) -> bool:
    found = import_rollouts(path, mapping, tool=tool)
    for table, rows in (("rollouts", found.rollouts), ("scores", found.scores), ("prompts", found.prompts)):
        parquet.write(scratch() / f"{os.getpid()}-{table}.parquet", rows, table)
    rewards = found.scores.column("reward").to_pylist()
    assert all(math.isfinite(reward) for reward in rewards)
    ids = found.rollouts.column("rollout_id").to_pylist()
    assert len(ids) == len(set(ids))
    return True


@st.composite
def tool_logs(draw: st.DrawFn) -> tuple[str, bytes]:
    names = ["prompt", "completion", "messages", "rewards", "score", "doc", "resps", "target", "input", "output", "gts"]
    records = draw(st.lists(st.dictionaries(st.sampled_from(names), trees(st.sampled_from(names))), max_size=3))
    return draw(st.sampled_from(sorted(FORMATS))), "\n".join(json.dumps(r, default=str) for r in records).encode()


def a_log_is_imported(given: tuple[str, bytes]) -> bool:
    tool, content = given
    return _imported(written("log.jsonl", content), {}, tool)


@cache
def whole_parquet() -> bytes:
    path = scratch() / "whole.parquet"
    rows = [{"p": "2+2=", "c": str(n), "r": float(n), "t": [1, n], "l": [-0.1, -0.2]} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


ARROW: list[pa.DataType] = [
    *(pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary()),
    *(pa.null(), pa.date32(), pa.timestamp("ns"), pa.decimal128(30, 2), pa.list_(pa.int64()), pa.list_(pa.float32())),
    *(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), pa.map_(pa.string(), pa.int32())),
    *(pa.dictionary(pa.int32(), pa.string()), pa.struct([("x", pa.string())]), pa.duration("us"), pa.time64("us")),
]


@st.composite
def parquet_files(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    mapping = draw(mappings())
    if draw(st.integers(0, 2)) == 0:
        return draw(injured_bytes(whole_parquet())), mapping
    usual = {"p": pa.string(), "c": pa.large_string(), "r": pa.float64(), "a": pa.string(), "g": pa.int8()}
    arrays = {}
    for name in "pcrtlagm":
        strange = name not in usual or draw(st.integers(0, 4)) == 0
        kind = draw(st.sampled_from(ARROW)) if strange else usual[name]
        arrays[name] = _array(kind, draw(st.integers(0, 3)) if strange else 1)
    path = scratch() / f"{os.getpid()}-made.parquet"
    pq.write_table(pa.table(arrays), path)
    return path.read_bytes(), mapping


def _array(kind: pa.DataType, variant: int) -> pa.Array:
    """Two rows of a type: nulls, zeros, or the values of a text."""
    if variant == 0 or pa.types.is_null(kind):
        return pa.nulls(2, kind)
    given: list[Any] = [[], []] if pa.types.is_list(kind) or pa.types.is_map(kind) else ["1", "0"]
    if pa.types.is_list(kind) and variant > 1:
        given = [[{"role": "user", "content": "x"}], []] if pa.types.is_struct(kind.value_type) else [[1, 0], [0, 5]]
    if pa.types.is_struct(kind):
        given = [{"x": "1"}, None]
    try:
        return pa.array(given, kind)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.array([1, 0], pa.int64()).cast(kind) if pa.types.is_integer(kind) else pa.nulls(2, kind)


def parquet_is_imported(given: tuple[bytes, dict[str, str]]) -> bool:
    content, mapping = given
    return _imported(written("rollouts.parquet", content), mapping)


@cache
def own_files() -> dict[str, bytes]:
    results = make_results(scratch() / "own", {"grpo-s0": 1})
    round = results / "grpo-s0/r0000"
    files = {
        "rollouts": round / "p0/rollouts-000.parquet",
        "scores": round / "p0/scores/exact-000.parquet",
        "batch": round / "batch.parquet",
    }
    return {table: path.read_bytes() for table, path in files.items()}


@st.composite
def own_tables(draw: st.DrawFn) -> tuple[str, bytes]:
    table = draw(st.sampled_from(sorted(own_files())))
    return table, draw(injured_bytes(own_files()[table]))


def an_own_table_is_read(given: tuple[str, bytes]) -> bool:
    table, content = given
    path = written("own.parquet", content)
    parquet.metadata(path)
    parquet.read(path)
    parquet.check(path, table)
    return True


TEMPLATES = ["{p}", "{p.x}", "{p.0}", "{}", "{", "}", "{{p}}", "{p}{c}", "{ p }", "{p!r}", "{p:>10}", ""]


@st.composite
def task_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    config: dict[str, Any] = {
        "prompt": draw(st.just("{p}") | st.sampled_from(TEMPLATES) | joined(TEMPLATES, 3)),
        "answer": draw(st.none() | st.just("{c}") | st.sampled_from(TEMPLATES)),
        "extract": draw(st.just("none") | st.sampled_from(["hash", "boxed", "last_number", "regex:(a+)+b", "regex:("])),
        "meta": draw(st.lists(st.sampled_from(["p", "c", "x", "format"]), max_size=1)),
        "splits": {"heldout": draw(st.integers(0, 2))},
    }
    if draw(st.integers(0, 3)) == 0:
        del config["prompt"]
        config |= {"messages": "x", "format": "chat"}
    turns = [{"role": "user", "content": "hi"}]
    whole = [{"p": f"{n}+1=", "c": f"so #### {n + 1}", "x": turns, "id": n} for n in range(draw(st.integers(1, 5)))]
    if draw(st.booleans()):
        whole = draw(injured_tree(whole, ["p", "c", "x", "role", "content"]))
    content = "\n".join(json.dumps(record, default=str) for record in whole).encode()
    return config, draw(injured_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


def a_task_is_prepared(given: tuple[dict[str, Any], bytes]) -> bool:
    config, content = given
    path = written("task.jsonl", content)
    config = config | {"source": {"kind": "jsonl", "path": path.name}}
    prepared = tasks.prepare("t", parse(TaskConfig, config, "task"), path.parent)
    assert prepared.train.num_rows + prepared.heldout.num_rows <= prepared.counts["rows"]
    return True


# --- answers and verdicts --------------------------------------------------------------------------------------------

ANSWERS = [
    *("\\boxed{", "\\fbox {", "\\boxed", "{", "}", "\\", "\\}", "\\{", "####", "#### ", "$", "$$", "\n", " ", "\u00a0"),
    *(
        "1,000",
        "-",
        "3.5",
        ".5",
        "1e5",
        ",",
        "0",
        "42",
        "\uff11\uff12",
        "\u0663",
        "x",
        "answer is",
        "\ud7ff",
        "\U0001f600",
        "\x00",
    ),
]
SPECS = ("none", "hash", "boxed", "last_number", "regex:answer is (.*)", "regex:(a|aa)+$", "regex:(?<x>\\d+)")


def boxed_by_search(text: str) -> str | None:
    """Independent: from every mark to its own closing brace, one character at a time."""
    last = None
    for mark in regex.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, at = 1, mark.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth == 0:
            last = text[mark.end() : at - 1].strip()
    return last


def answers_are_found(text: str) -> bool:
    found = [extractor(spec)(text) for spec in SPECS]
    assert all(answer is None or isinstance(answer, str) for answer in found)
    assert boxed(text) == boxed_by_search(text)
    return any(answer is not None for answer in found[1:])


RULES = [
    *(ExactScorer(extract=spec, max_error_share=1.0) for spec in SPECS),
    ExactScorer(ignore_case=True, strip=False),
    FormatScorer(pattern=r"(?s)(a|aa)+#### \d+", full=False, max_error_share=1.0),
    LengthScorer(limit=20, cache=10),
]


def a_row(completion: str, answer: str | None) -> Row:
    messages = [{"role": "user", "content": "q"}]
    return Row("r", "p", "g", 0, completion, len(completion), "stop", [], "t", messages, answer, {})


def rules_judge(given: tuple[str, str]) -> bool:
    completion, answer = given
    rewards = []
    for rule in RULES:
        row = score("s", rule, [a_row(completion, answer)], needs={}, threads=1, root=scratch()).to_pylist()[0]
        assert -1.0 <= row["reward"] <= 1.0
        assert row["error"] is None or row["reward"] == 0.0
        assert isinstance(read_answer(rule, completion), str)
        rewards.append(row["reward"])
    if not completion.strip():
        assert max(rewards) <= 0.0
    return max(rewards) > 0.0


MATHS = [
    *("\\frac{", "\\sqrt[", "\\int_0^", "\\sum_{n=1}^{", "\\lim_{x\\to", "^{", "_{", "}", "{", "(", ")", "[", "]", "|"),
    *("10", "^", "9", "!", "\\infty", "\\pi", "e", "i", "x", "+", "-", "/", "\\cdot", "=", "<", "\\in", ",", ".", "%"),
    *("$", "\\boxed{", "\\text{", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\cup", "\\{", "\\}", "1", "2"),
    *("\\log_", "\\sin", "\\binom{", "\\overline{", "^\\circ", "\\pm", "\\or", "**", "10**10**10", "\\mod"),
]


WHOLE_MATHS = [
    "\\frac{1}{2}",
    "x^2+1",
    "\\{1, 2\\}",
    "(0, \\infty)",
    "3\\sqrt{2}",
    "\\begin{pmatrix}1 & 2\\end{pmatrix}",
]
WORDED_MATHS = joined(MATHS) | st.sampled_from(WHOLE_MATHS).flatmap(
    lambda text: injured_text(f"so \\boxed{{{text}}}", MATHS)
)


@cache
def math_worker() -> _Worker:
    return _Worker("rollway.scorers.math_verify_worker", 1.0)


def mathematics_is_compared(given: tuple[str, str]) -> bool:
    answer, completion = given
    verdict = math_worker().ask((answer, completion)).checked()
    assert verdict.reward in (0.0, 1.0)
    assert isinstance(read_answer(MathVerifyScorer(), completion), str)
    return verdict.reward == 1.0


def a_verdict_is_read(text: str) -> bool:
    try:
        found, reason = read_verdict(text, 1.0, 10.0)
    except ValueError:
        return False
    assert 1.0 <= found <= 10.0
    assert isinstance(reason, str)
    return True


def a_reply_is_whole(draw_pieces: list[str]) -> st.SearchStrategy[str]:
    """Texts around a verdict, or made of its pieces."""
    whole = ['{"reason": "good", "score": 7}', '```json\n{"score": 3.5}\n```', '{"score": "4"} and so {"score": 5}']
    return st.sampled_from(whole).flatmap(lambda text: injured_text(text, draw_pieces)) | joined(draw_pieces)


def a_template_is_filled(given: tuple[str, dict[str, Any]]) -> bool:
    template, fields = given
    return render(template, fields, "place") is not None


PAIRS = st.tuples(joined(ANSWERS), joined(ANSWERS, 6).filter(lambda text: bool(text.strip())))
TARGETS = [
    Target("config trees", "any mapping as a config", lambda: trees(st.sampled_from(key_names())), config_is_read),
    Target(
        "configs",
        "the repository's configs, injured",
        lambda: st.sampled_from(configs()).flatmap(lambda whole: injured_tree(whole, key_names())),
        config_is_read,
    ),
    Target(
        "config files",
        "YAML files, injured byte by byte",
        lambda: (
            st.sampled_from([yaml.safe_dump(c).encode() for c in configs()]).flatmap(injured_bytes)
            | st.binary()
            | st.sampled_from(
                [b"[" * 3000, b"a: 2026-13-01", b"a: &x [*x]", b"- " * 2000, b"? [a]\n: 1", b"a: !!python/x 1"]
            )
        ),
        yaml_is_read,
    ),
    Target(
        "recipes",
        "the recipes, injured",
        lambda: st.sampled_from([recipe_mapping(name) for name in recipe_names()]).flatmap(
            lambda whole: injured_tree(whole, key_names())
        ),
        recipe_is_read,
    ),
    Target("specs", "what a job gets on its command line, injured", stage_specs, spec_is_read),
    Target("JSON lines", "import of rollouts, and mappings", json_lines, lines_are_imported),
    Target("logs of tools", "import of the logs of other trainers", tool_logs, a_log_is_imported),
    Target("Parquet", "import of files of any columns, or injured", parquet_files, parquet_is_imported),
    Target("own tables", "rollway's Parquet files, injured", own_tables, an_own_table_is_read),
    Target("tasks", "sources of prompts, and templates", task_files, a_task_is_prepared),
    Target("answers", "extraction from any text", lambda: joined(ANSWERS, 60), answers_are_found),
    Target("rules", "exact, format and length on any text", lambda: PAIRS, rules_judge),
    Target(
        "mathematics",
        "math_verify",
        lambda: st.tuples(st.sampled_from(WHOLE_MATHS) | joined(MATHS, 6), WORDED_MATHS),
        mathematics_is_compared,
    ),
    Target(
        "verdicts",
        "a judge's replies",
        lambda: a_reply_is_whole(
            ['{"score": ', "7", "}", '"reason": "', '"', "{", "[", "NaN", "1e999", "true", "\\ud800", "[" * 3000]
        ),
        a_verdict_is_read,
    ),
    Target(
        "templates",
        "prompts of tasks and judges",
        lambda: st.tuples(joined(TEMPLATES, 4), st.dictionaries(st.sampled_from("pcx"), trees(st.sampled_from("xy0")))),
        a_template_is_filled,
    ),
    Target("SQL files", "the recipes' SQL, injured, with any parameters", sql_texts, sql_curates),
    Target("SQL headers", "declarations of parameters", sql_headers, a_header_is_read),
    Target("SQL texts", "any text as a SQL file", lambda: joined(WORDS), sql_text_is_read),
    Target(
        "SQL values",
        "texts as parameters stay texts",
        lambda: joined(["'", '"', ";", "--", "$word", "\\", "DROP TABLE scored", "\x00", "/*", "{", "?"]).filter(
            lambda text: "\x00" not in text
        ),
        a_text_stays_a_text,
    ),
    Target(
        "questions",
        "`rollway sql`",
        lambda: st.tuples(
            st.sampled_from(QUERIES).flatmap(lambda query: injured_text(query, WORDS)),
            st.sampled_from([form for form in OUTPUTS if form != "parquet"]),
        ),
        a_question_is_answered,
    ),
]
