"""Stage specs: the slice of the config that decides what a stage writes, as JSON on its command line.

A spec holds no output path, thread count or host. Raising a stage's version in `STAGE_VERSION` reruns it everywhere.
"""

import json

from pydantic import NonNegativeInt, PositiveInt

from rollway.config.base import ConfigError, Strict, as_given
from rollway.config.curation import CurateConfig, SqlPart
from rollway.config.experiment import EvaluateConfig
from rollway.config.lm_eval import LmEvalConfig
from rollway.config.policies import WarmupConfig
from rollway.config.recipes import parse
from rollway.config.reward_models import RewardModelConfig
from rollway.config.rollouts import Engine, RolloutConfig, Sampling
from rollway.config.scorers import DiscriminatorScorer, ScoreConfig, Scorer, TeacherScorer
from rollway.config.tasks import TaskConfig
from rollway.config.training import TrainConfig

STAGE_VERSION = {
    "prepare": 1,
    "warmup": 1,
    "reward_model": 1,
    "rollout": 1,
    "score": 1,
    "curate": 1,
    "train": 1,
    "check_teacher": 1,
    "discriminator": 1,
    "evaluate": 1,
    "lm_eval": 1,
    "track": 1,
    "report": 1,
    "catalog": 1,
    "describe": 1,
}


class PrepareSpec(Strict):
    version: PositiveInt
    name: str
    task: TaskConfig


class WarmupSpec(Strict):
    version: PositiveInt
    warmup: WarmupConfig
    seed: NonNegativeInt


class PairRound(Strict):
    """How one round's rollouts are ranked and paired."""

    round: NonNegativeInt
    score: ScoreConfig
    curate: CurateConfig


class RewardModelSpec(Strict):
    version: PositiveInt
    config: RewardModelConfig
    rounds: list[PairRound] = []
    """Only for pairs of a run."""


class RolloutSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    pass_number: NonNegativeInt
    policy_round: NonNegativeInt
    shard: NonNegativeInt
    rollout: RolloutConfig
    """Of a derived pass with the one entry of `derive` that it is; of others without."""
    score: ScoreConfig | None = None
    """Only in passes after the first: how the earlier passes' scores make the reward."""
    reward: SqlPart | None = None
    filter: SqlPart | None = None
    """Only in passes after the first: the filter that groups must survive."""
    horizon: PositiveInt | None = None
    """Only in passes after the first, and only where reward, filter or parents takes `progress` from it:
    `curate.horizon`."""
    author: str | None = None
    """Input, only of a derived pass that another policy than the round's writes: its policy.json."""
    teacher: str | None = None
    """Input, only where a warm-up's policy has a share in the tokens (`rollout.mix`): its policy.json."""


class ScoreSpec(Strict):
    version: PositiveInt
    scorer: str
    config: Scorer
    trained: str | None = None
    """Input, only of a scorer that applies a reward model trained here, or a discriminator: its reward_model.json."""
    policy: str | None = None
    """Input, only of a teacher: a policy.json of the run, whose tokens it scores."""
    teacher: str | None = None
    """Input, only of a teacher that is a policy of this experiment: its policy.json."""


class CheckTeacherSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    scorer: str
    config: TeacherScorer
    """A live teacher's model is the policy that it is before the round."""
    sampling: Sampling
    """Of both, the rollouts' own."""
    correct: str
    correctness: Scorer
    """The scorer called `correct`, which says what is right."""
    threshold: float
    trained: str | None = None
    """As in ScoreSpec."""


class DiscriminatorSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    scorer: str
    config: DiscriminatorScorer


class CurateSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    score: ScoreConfig
    curate: CurateConfig
    teacher_columns: list[str] = []
    """Only with `curate.teacher`: what training reads of it."""


class TrainSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    temperature: float
    """Sampling temperature of the rollouts, at which log-probs are recomputed."""
    train: TrainConfig
    fresh: bool = False
    """Only of a fork's first round, with `optimizer: fresh`: the policy's moments and counters are left behind."""
    teacher: str | None = None
    """Input, only of a live teacher that is a warm-up's policy: its policy.json."""


class EvaluateSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    evaluate: EvaluateConfig
    max_tokens: PositiveInt
    stop: list[str]
    engine: Engine
    scorer_name: str
    scorer: Scorer
    threshold: float
    trained: str | None = None
    """As in ScoreSpec."""


class LmEvalSpec(Strict):
    version: PositiveInt
    seed: NonNegativeInt
    round: NonNegativeInt
    lm_eval: LmEvalConfig


class RunInfo(Strict):
    """What tables and reports need to know of a run."""

    name: str
    """Key in `runs`."""
    recipe: str
    title: str
    seed: NonNegativeInt
    task: str
    warmup: str
    rounds: PositiveInt
    parent: str | None = None
    fork_round: NonNegativeInt | None = None
    fork_stage: str | None = None
    warmup_sft: bool = False
    """Whether the warm-up was taught demonstrations: metrics.json then lies beside its policy."""


class DescribeSpec(Strict):
    """What `run.json` says of a run."""

    version: PositiveInt
    info: RunInfo
    settings: str
    """The run's resolved config as JSON."""


class CatalogSpec(Strict):
    version: PositiveInt


class TrackSpec(Strict):
    version: PositiveInt
    run: str
    project: str
    uri: str
    traces: NonNegativeInt = 4
    usage: bool = False


class ReportSpec(Strict):
    version: PositiveInt
    project: str


SPECS: dict[str, type[Strict]] = {
    "prepare": PrepareSpec,
    "warmup": WarmupSpec,
    "reward_model": RewardModelSpec,
    "rollout": RolloutSpec,
    "score": ScoreSpec,
    "curate": CurateSpec,
    "train": TrainSpec,
    "check_teacher": CheckTeacherSpec,
    "discriminator": DiscriminatorSpec,
    "evaluate": EvaluateSpec,
    "lm_eval": LmEvalSpec,
    "track": TrackSpec,
    "report": ReportSpec,
    "catalog": CatalogSpec,
    "describe": DescribeSpec,
}


def dump(spec: Strict) -> str:
    """Canonical JSON of a spec: only what was set, keys sorted, so that new options with defaults rerun nothing."""
    return json.dumps(as_given(spec), sort_keys=True)


def load(stage: str, text: str) -> Strict:
    """Parses a spec. Raises ConfigError, also when it was written for another version of the stage."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--spec of stage {stage}: not JSON ({error})") from None
    return parse(SPECS[stage], value, f"--spec of stage {stage}")
