"""The project that is tortured, and all that it leaves behind, file by file."""

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

from rollway.config import deep_merge
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


FURTHER: dict[str, Any] = {
    "warmups": {"teacher": deep_merge(TINY["warmups"]["tiny"], {"policy": {"hidden": 48}})},
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

PROJECTS: dict[str, dict[str, Any]] = {"few": {}, "every": EVERY, "further": FURTHER}
"""few: one run of two rounds, without what takes most of the time."""


def config(project: str) -> dict[str, Any]:
    """project: a key of PROJECTS."""
    return deep_merge(deep_merge(TINY, SMALL), PROJECTS[project])


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
