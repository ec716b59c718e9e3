"""KEPO through the real Snakemake: a policy without signal, a teacher that writes hints, answers trained without."""

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
PAGE = ROOT / "docs/methods/kepo.md"
DERIVE = [
    {
        "name": "hint",
        "parents": {"sql": "first_of_group", "groups": "unrewarded"},
        "context": [{"prompt": "{prompt}{answer}?"}],
        "author": {"kind": "warmup", "name": "teacher"},
        "trained": "never",
    },
    {
        "name": "hinted",
        "parents": {"sql": "not_accepted"},
        "extract": r"regex:\*(.)\*",
        "context": [{"prompt": "{prompt}{completion}:{answer}!"}],
        "samples": 2,
        "attempts": 2,
        "trained": "plain",
    },
]
LESSONS = {"source": {"kind": "jsonl"}, "prompt": "{prompt}", "answer": "{text}", "splits": {"heldout": 1}}
SMALL = {
    "policy": {"tokenizer": {"alphabet": "abcdefgh>?!*:,()[]"}, "hidden": 48},
    "sft": {"steps": 250, "batch": 64, "lr": 5.0e-3},
}
CONFIG: dict[str, Any] = deep_merge(
    TINY,
    {
        "tasks": {
            "for_student": deep_merge(LESSONS, {"source": {"path": "student.jsonl"}}),
            "for_teacher": deep_merge(LESSONS, {"source": {"path": "teacher.jsonl"}}),
        },
        "warmups": {"tiny": {"task": "for_student", **SMALL}},
        "defaults": {
            "rollout": {"prompts": 12, "sampling": {"max_tokens": 11}},
            "score": {
                "scorers": {
                    "exact": {"kind": "exact", "extract": r"regex:\[(.*?)\]"},
                    "format": {"kind": "format", "pattern": r"\(.*\)\[.*\]"},
                    "teacher": {"top_k": 8},
                }
            },
            "train": {"optimizer": {"lr": 2.0e-3}},
        },
    },
)
CONFIG["warmups"]["teacher"] = deep_merge(CONFIG["warmups"]["tiny"], {"task": "for_teacher"})
CONFIG["runs"] = {"kepo": {"recipe": "kepo", "rollout": {"derive": DERIVE}}}


def lessons(role: str) -> list[dict[str, str]]:
    """The teacher answers in the format and writes hints. The student answers words that begin with e to h only where
    it reads a hint, and else says anything: their groups are without any reward."""
    draw = random.Random(role)
    rows = []
    for a in "abcdefgh":
        for b in "abcdefgh":
            right = f"({b},{a})[{b}{a}]"
            if role == "teacher":
                rows.append({"prompt": f"{a}{b}>", "text": right})
                rows.append({"prompt": f"{a}{b}>{b}{a}?", "text": f"*{b}*"})
            else:
                anything = "".join(draw.choices("abcdefgh", k=2))
                rows.append({"prompt": f"{a}{b}>", "text": right if a in "abcd" else anything})
                rows.append({"prompt": f"{a}{b}>{b}:{b}{a}!", "text": right})
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project(tmp_path_factory.mktemp("kepo"), CONFIG)
    for role in ("student", "teacher"):
        text = "\n".join(map(json.dumps, lessons(role)))
        (project.folder / f"{role}.jsonl").write_text(text + "\n")
    project.snakemake("results/kepo-s0/r0001/policy.json")
    return project.folder


def table(folder: Path, query: str) -> list[dict[str, Any]]:
    with open_catalog(folder / "results") as connection:
        return connection.sql(query).to_arrow_table().to_pylist()


def test_hints_reach_the_groups_that_fail(finished: Path) -> None:
    """By the query of the page: some groups trigger, most attempts are accepted, and what is right is gated."""
    query = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    rounds = table(finished, query)
    assert [row["round"] for row in rounds] == [0]
    assert 0.2 < rounds[0]["trigger_rate"] < 0.8
    assert rounds[0]["acceptance_rate"] > 0.5
    assert rounds[0]["gated_share"] > 0.3
    metrics = table(finished, "SELECT name, value FROM metrics WHERE stage = 'train' AND round = 0")
    named = {row["name"]: row["value"] for row in metrics}
    assert named["loss/distill"] > 0.0
    assert 0.0 < named["distill/share"] < 1.0


def test_accepted_groups_keep_their_size(finished: Path) -> None:
    """G rows per group; hints are in none, and hinted ones only where both are right."""
    rows = table(
        finished,
        "SELECT b.group_id, list(r.source) AS source, bool_and(b.correct) FILTER (r.source = 'hinted') AS accepted "
        "FROM batch AS b JOIN rollouts AS r USING (run, rollout_id) WHERE b.round = 0 GROUP BY ALL",
    )
    assert len(rows) == 12
    for row in rows:
        assert len(row["source"]) == 4
        assert row["source"].count("hinted") in (0, 2)
        assert "hint" not in row["source"]
        assert row["accepted"] in (None, True)
    assert any(row["accepted"] for row in rows)


def test_the_hint_never_reaches_the_trained_ids(finished: Path) -> None:
    run = finished / "results/kepo-s0"
    reader = load_reader(run / "r0001/policy.json")
    files = sorted((run / "r0000").glob("p*/rollouts-*.parquet"))
    batch = pq.read_table(run / "r0000/batch.parquet")
    rows = training_batch(batch, drawn(files, batch.column("rollout_id"))).rows
    injected = [row for row in rows if row.source == "hinted"]
    assert injected
    for row in rows:
        assert re.fullmatch(r"[a-h]{2}>", reader.tokenizer.decode(list(row.prompt_tokens)))
    read = [t for file in files[2:] for t in pq.read_table(file).column("prompt_tokens").to_pylist()]
    assert all(re.fullmatch(r"([a-h])([a-h])>\2:\2\1!", reader.tokenizer.decode(tokens)) for tokens in read)


def test_the_teacher_reads_the_prompt_without_hint(finished: Path) -> None:
    """Its columns of a hinted rollout are what it says of the same tokens after the task's prompt alone."""
    import torch

    from rollway.policies.causal_lm import load

    run = finished / "results/kepo-s0"
    teacher = load(finished / "results/warmups/teacher-s0/policy.json", "main").model
    files = sorted((run / "r0000").glob("p*/rollouts-*.parquet"))
    batch = pq.read_table(run / "r0000/batch.parquet")
    rows = training_batch(batch, drawn(files, batch.column("rollout_id"))).rows
    row = next(row for row in rows if row.source == "hinted")
    ids = torch.tensor([[*map(int, row.prompt_tokens), *map(int, row.tokens)]])
    with torch.no_grad():
        logp = teacher(input_ids=ids).logits[0, len(row.prompt_tokens) - 1 : -1].log_softmax(-1)
    best = logp.topk(row.said.topk_ids.shape[1], dim=-1)
    assert torch.allclose(torch.from_numpy(row.said.topk_logprobs.copy()), best.values, atol=1e-4)
