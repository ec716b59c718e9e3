"""ExPO through the real Snakemake: a policy that can explain answers which it does not find."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rollway.config import deep_merge
from rollway.policies.causal_lm import load_reader
from rollway.store.catalog import open_catalog
from rollway.store.payload import drawn
from rollway.training.batch import training_batch
from workflow.project import ROOT, TINY, Project

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs/methods/expo.md"
EXPLAIN = "{prompt}{answer}?"
DERIVE = {
    "name": "explanation",
    "parents": {"sql": "first_of_group"},
    "context": [{"prompt": EXPLAIN}],
    "trained": "plain",
}
CONFIG: dict[str, Any] = deep_merge(
    TINY,
    {
        "tasks": {
            "lessons": {
                "source": {"kind": "jsonl", "path": "lessons.jsonl"},
                "prompt": "{prompt}",
                "answer": "{text}",
                "splits": {"heldout": 1},
            }
        },
        "warmups": {
            "tiny": {
                "task": "lessons",
                "policy": {"tokenizer": {"alphabet": "abcdefgh>?,:"}, "hidden": 48},
                "sft": {"steps": 250, "batch": 64, "lr": 5.0e-3},
            }
        },
        "defaults": {
            "rollout": {"prompts": 16, "sampling": {"max_tokens": 9}},
            "score": {
                "scorers": {
                    "exact": {"kind": "exact", "extract": "regex:.,.:(..)"},
                    "plain": {"kind": "teacher", "model": {"kind": "policy"}},
                },
                "reward": {"exact": 1.0},
            },
            "train": {"optimizer": {"lr": 2.0e-3}},
        },
        "runs": {"grpo": None},
    },
)
CONFIG["runs"] = {"expo": {"recipe": "expo", "rollout": {"derive": [DERIVE]}, "train": {"objective_horizon": 50}}}


def lessons() -> list[dict[str, str]]:
    """Each word's own answer is taught wrong; the steps to a given answer are taught right."""
    draw = random.Random(0)
    rows = []
    for a in "abcdefgh":
        for b in "abcdefgh":
            wrong = draw.choice([x + y for x in "abcdefgh" for y in "abcdefgh" if x + y != b + a])
            rows.append({"prompt": f"{a}{b}>", "text": f"{b},{a}:{wrong}"})
            rows.append({"prompt": f"{a}{b}>{b}{a}?", "text": f"{b},{a}:{b}{a}"})
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project(tmp_path_factory.mktemp("expo"), CONFIG)
    (project.folder / "lessons.jsonl").write_text("\n".join(map(json.dumps, lessons())) + "\n")
    scores = [f"results/expo-s0/r0000/p{n}/scores/plain-000.parquet" for n in (0, 1)]
    project.snakemake("results/expo-s0/r0001/policy.json", *scores)
    return project.folder


def table(folder: Path, query: str) -> list[dict[str, Any]]:
    with open_catalog(folder / "results") as connection:
        return connection.sql(query).to_arrow_table().to_pylist()


def test_failing_groups_learn_from_explanations(finished: Path) -> None:
    """All groups of round 0 fail but for luck; their explanations are right, and are what the policy is moved by."""
    own = table(
        finished,
        "SELECT source, avg(reward) AS reward FROM rollouts JOIN scores USING (run, rollout_id) "
        "WHERE rollouts.round = 0 AND scorer = 'exact' GROUP BY ALL ORDER BY ALL",
    )
    reward = {row["source"]: row["reward"] for row in own}
    assert reward["policy"] < 0.2
    assert reward["explanation"] > 0.7
    shares = table(finished, "SELECT round, route, row_count FROM routes ORDER BY ALL")
    found = {(row["round"], row["route"]): row["row_count"] for row in shares}
    assert found[0, "policy"] == 64
    assert 10 <= found[0, "imitate"] <= 16
    named = table(finished, "SELECT name, value FROM metrics WHERE stage = 'train' AND round = 0")
    measured = {row["name"]: row["value"] for row in named}
    assert measured["imitate/nll"] > 0.0
    assert measured["loss/imitate"] > abs(measured["loss/policy"])


def test_the_answer_never_reaches_the_trained_ids(finished: Path) -> None:
    """Trained prompts are those of the task: of the explanation as of its siblings, and without the answer."""
    run = finished / "results/expo-s0"
    reader = load_reader(run / "r0001/policy.json")
    files = sorted((run / "r0000").glob("p*/rollouts-*.parquet"))
    batch = pq.read_table(run / "r0000/batch.parquet")
    rows = training_batch(batch, drawn(files, batch.column("rollout_id"))).rows
    copied = [row for row in rows if row.route == "imitate"]
    assert copied
    plain = {row.group: list(row.prompt_tokens) for row in rows if row.route == "policy"}
    for row in copied:
        assert list(row.prompt_tokens) == plain[row.group]
        text = reader.tokenizer.decode(list(row.prompt_tokens))
        assert re.fullmatch(r"[a-h]{2}>", text)
    read = [reader.tokenizer.decode(tokens) for tokens in pq.read_table(files[1]).column("prompt_tokens").to_pylist()]
    assert len(read) == 16
    assert all(re.fullmatch(r"([a-h])([a-h])>\2\1\?", prompt) for prompt in read)


def test_the_page_of_the_method_asks_a_question_that_has_an_answer(finished: Path) -> None:
    query = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    rows = table(finished, query)
    explained = [row for row in rows if row["source"] == "explanation"]
    assert [row["round"] for row in explained] == [0]
    assert all(row["nll"] > 0.0 and 0.0 <= row["p_answer"] <= 1.0 for row in explained)
