"""The part of the plan that says of a run what tables and reports need to know."""

from typing import Any

from rollway.config.experiment import RunConfig
from rollway.runtime.specs import RunInfo


def run_info(name: str, seed: int, config: RunConfig) -> RunInfo:
    """name: key in `runs`."""
    fork = config.fork
    lineage: dict[str, Any] = {}
    if fork:
        lineage = {"parent": f"{fork.run}-s{seed}", "fork_round": fork.round, "fork_stage": fork.stage}
    return RunInfo(
        name=name,
        recipe=config.recipe,
        title=config.title,
        seed=seed,
        task=config.task,
        warmup=config.warmup,
        rounds=config.rounds,
        **lineage,
    )
