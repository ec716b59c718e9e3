"""The project that is tortured, and all that it leaves behind, file by file."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollway.config import deep_merge
from scorers.stub_judge import Stub
from workflow.project import TINY, Project

MADE = ("report.html",)
"""Not compared as they are: the report shows the jobs' times, and is compared without them."""
NO_RESULTS = (".worker", ".cache")

_OWN = {"exact": {"kind": "exact"}, "short": {"kind": "length", "limit": 4, "cache": 3}}
_BY_LENGTH = {"scorers": _OWN, "reward": {"exact": 1.0, "short": 0.1}, "correct": "exact"}
SMALL: dict[str, Any] = {
    "defaults": {"rollout": {"shards": 2, "part": 4}, "evaluate": {"every": 2}},
    "warmups": {"tiny": {"sft": {"steps": 40}}},
    "runs": {"grpo": {"recipe": "grpo", "score": _BY_LENGTH}},
    "mlflow": {"enabled": False},
}
"""Changes to TINY: two shards in small parts, two rounds, evaluations before and after. So early a policy is seldom
right: that lengths count makes every update one."""

_TAUGHT = {
    "scorers": {**_OWN, "taught": {"kind": "reward_model", "trained": "judge"}},
    "reward": {"taught": 1.0, "short": 0.1},
    "correct": "exact",
}
EVERY: dict[str, Any] = {
    "runs": {"critic": {"recipe": "ppo", "rounds": 1, "score": _TAUGHT}},
    "reward_models": {
        "judge": {
            "base": {"kind": "warmup", "name": "tiny"},
            "pairs": {"kind": "run", "run": "grpo"},
            "epochs": 4,
            "batch": 2,
        }
    },
    "mlflow": {"enabled": True},
}
"""Changes to both: a second run, whose reward is a model trained on pairs of the first, with a critic; and MLflow."""


_LARGER = deep_merge(TINY["warmups"]["tiny"], {"policy": {"hidden": 48}})
FURTHER: dict[str, Any] = {
    "warmups": {"teacher": _LARGER},
    "runs": {
        "scope": {"recipe": "scope", "rounds": 1},
        "gad": {
            "recipe": "gad",
            "rounds": 2,
            "rollout": {"group": 2},
            "score": {
                "scorers": {
                    "discriminator": {
                        "kind": "discriminator",
                        "references": [
                            f"results/grpo-s{{seed}}/r000{round}/p0/rollouts-00{shard}.parquet"
                            for round in (0, 1)
                            for shard in (0, 1)
                        ],
                        "training": {"epochs": 2},
                    }
                }
            },
        },
        "refilled": {
            "recipe": "grpo",
            "rounds": 1,
            "score": _BY_LENGTH,
            "rollout": {"passes": 2, "refill": {}},
            "curate": {"filter": {"sql": "informative_groups"}},
        },
        "revised": {
            "recipe": "grpo",
            "rounds": 1,
            "score": _BY_LENGTH,
            "rollout": {
                "derive": [
                    {
                        "name": "revision",
                        "parents": {"sql": "each"},
                        "context": [{"prefix": "{completion}>{verdict}>", "right": "so", "wrong": "no"}],
                    }
                ]
            },
            "curate": {"filter": {"sql": "sampled"}},
        },
        "forked": {"recipe": "dr-grpo", "rounds": 1, "score": _BY_LENGTH, "fork": {"run": "grpo", "round": 0}},
    },
}
"""Other changes to both: a checked teacher whose scores go token by token into the batch, a discriminator per round, a
pass that refills, one that is derived, and a fork."""

_JUDGED = {
    "scorers": {
        **_OWN,
        "program": {"kind": "program", "format": "stdio", "code": "all"},
        "math": {"kind": "math_verify"},
        "mine": {"kind": "python", "function": "mine.py:judge", "needs": ["exact"], "timeout": 60.0},
        "judge": {"kind": "judge", "model": "letters", "prompt": "{prompt} {completion}", "normalise": False},
    },
    "reward": {"exact": 1.0, "program": 1.0, "math": 1.0, "mine": 0.1, "judge": 0.1},
    "correct": "exact",
}
SCORERS: dict[str, Any] = {
    "tasks": {"spell": {"meta": ["tests"], "demonstration": "{answer}"}},
    "warmups": {"teacher": _LARGER},
    "runs": {
        "mixed": {"recipe": "minillm-mixed", "rounds": 1},
        "judged": {"recipe": "grpo", "rounds": 1, "score": _JUDGED},
        "shown": {"recipe": "dft", "rounds": 1, "rollout": {"prompts": 4}, "score": _BY_LENGTH},
        "stored": {
            "recipe": "grpo",
            "rounds": 1,
            "score": _BY_LENGTH,
            "rollout": {
                "group": 2,
                "engine": {
                    "kind": "stored",
                    "files": [f"results/grpo-s{{seed}}/r0000/p0/rollouts-00{shard}.parquet" for shard in (0, 1)],
                },
            },
        },
    },
}
"""Other changes to both: programs in the sandbox, math_verify's processes, a function of one's own in a process of its
own, a judge behind HTTP; tokens drawn from teacher and policy together; demonstrations as rollouts; completions that
another run stored."""
_FUNCTION = """def judge(row):
    return {"reward": len(set(row["completion"])) + row["scores"]["exact"], "letters": len(row["completion"])}
"""

PROJECTS: dict[str, dict[str, Any]] = {"few": {}, "every": EVERY, "further": FURTHER, "scorers": SCORERS}
"""few: one run of two rounds, without what takes most of the time."""
OWN_STAGES = {
    r"refilled-s0/r0000/rollout-p1": "rollout, a pass that refills",
    r"revised-s0/r0000/rollout-p1": "rollout, derived",
    r"forked-s0/r0000/curate": "curate, of a fork",
    r"forked-s0/r0001/train": "train, of a fork",
    r"mixed-s0/r0000/rollout": "rollout, mixed with a teacher",
    r"shown-s0/r0000/rollout": "rollout, demonstrations",
    r"stored-s0/r0000/rollout": "rollout, stored completions",
    r"judged-s0/r0000/score-p0-program": "score, programs",
    r"judged-s0/r0000/score-p0-math": "score, math_verify",
    r"judged-s0/r0000/score-p0-mine": "score, own function",
    r"judged-s0/r0000/score-p0-judge": "score, judge",
}
"""Patterns of logs -> what is counted as a stage of its own, and so killed in every project that has it."""


def config(project: str) -> dict[str, Any]:
    """project: a key of PROJECTS."""
    return deep_merge(deep_merge(TINY, SMALL), PROJECTS[project])


@contextmanager
def making(kind: str) -> Iterator[Callable[[Path], Project]]:
    """Makes projects of a kind in a given folder, with what they need outside of it while this lasts."""
    if kind != "scorers":
        yield lambda folder: Project(folder, config(kind))
        return
    judge = Stub(lambda prompt, attempt: (200, json.dumps({"score": 1 + len(set(prompt)) % 10}), {}))
    where = {"runs": {"judged": {"score": {"scorers": {"judge": {"url": judge.url}}}}}}

    def project(folder: Path) -> Project:
        made = Project(folder, deep_merge(config(kind), where))
        (folder / "mine.py").write_text(_FUNCTION)
        words = [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]
        asked = [{**row, "tests": [{"input": row["word"], "output": row["answer"]}]} for row in words]
        (folder / "words.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
        return made

    try:
        yield project
    finally:
        judge.close()


def contents(project: Project) -> dict[str, str]:
    """Everything that a finished project holds -> sha256: each file by its path inside `results`, hidden ones and empty
    folders included; the report without times; what MLflow shows."""
    results = project.folder / "results"
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results)
        if name.parts[0] in NO_RESULTS or name.name in MADE:
            continue
        if path.is_file():
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not any(path.iterdir()):
            found[f"{name}/"] = "empty"
    if (results / "report.html").exists():
        from rollway.report.build import render

        found["report.html without times"] = hashlib.sha256(render(results).encode()).hexdigest()
    if (project.folder / "mlflow.db").exists():
        found["mlflow.db"] = hashlib.sha256(repr(shown(project.folder / "mlflow.db")).encode()).hexdigest()
    return found


def shown(database: Path) -> list[tuple[Any, ...]]:
    """Runs, metrics, parameters and data sets that are not deleted, by name: ids and times are of the moment."""
    queries = (
        "SELECT name, status FROM runs WHERE lifecycle_stage = 'active' ORDER BY 1, 2",
        """SELECT r.name, m.key, m.step, m.value, m.is_nan FROM metrics m JOIN runs r USING (run_uuid)
        WHERE r.lifecycle_stage = 'active' ORDER BY 1, 2, 3, 4""",
        """SELECT r.name, p.key, p.value FROM params p JOIN runs r USING (run_uuid)
        WHERE r.lifecycle_stage = 'active' ORDER BY 1, 2""",
        """SELECT r.name, d.name, d.digest FROM runs r JOIN inputs i ON i.destination_id = r.run_uuid
        JOIN datasets d ON d.dataset_uuid = i.source_id WHERE r.lifecycle_stage = 'active' ORDER BY 1, 2, 3""",
    )
    with sqlite3.connect(database) as connection:
        return [row for query in queries for row in connection.execute(query)]


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose content is not the same in both, or that only one has."""
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
