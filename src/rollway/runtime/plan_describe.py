"""The part of the plan that says of a run what tables and reports need to know."""

from typing import Any

from rollway.config.experiment import RunConfig
from rollway.config.policies import WarmupConfig
from rollway.runtime.specs import RunInfo


def run_info(name: str, seed: int, config: RunConfig, warmup: WarmupConfig | None) -> RunInfo:
    """name: key in `runs`; warmup: that of the run."""
    fork = config.fork
    given: dict[str, Any] = {"warmup_sft": True} if warmup is not None and warmup.sft is not None else {}
    if fork:
        given |= {"parent": f"{fork.run}-s{seed}", "fork_round": fork.round, "fork_stage": fork.stage}
    return RunInfo(
        name=name,
        recipe=config.recipe,
        title=config.title,
        seed=seed,
        task=config.task,
        warmup=config.warmup,
        rounds=config.rounds,
        **given,
    )
