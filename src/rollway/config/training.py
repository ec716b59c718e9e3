"""The training stage: objective, token-level advantages, optimiser, batching."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollway.config.base import Strict
from rollway.config.objectives import Objective


class ReturnsAdvantage(Strict):
    """REINFORCE++ (arXiv 2501.03262): discounted returns of reward and KL penalty, whitened over valid tokens."""

    kind: Literal["returns"] = "returns"
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """Discount per token."""
    kl: NonNegativeFloat = 0.01
    """beta_r: weight of the per-token penalty (old - reference log-prob) in the reward. 0: no reference is needed."""
    whiten: bool = True
    """Scale to mean 0 and variance 1; False: the returns as they are."""


class GaeAdvantage(Strict):
    """Generalised advantage estimation (arXiv 1506.02438) with a critic; whitened once the value targets are taken."""

    kind: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """Discount per token."""
    lam: float = Field(0.95, ge=0.0, le=1.0)
    """lambda: decay per token of later errors of the critic; 1: none."""
    kl: NonNegativeFloat = 0.0
    """beta_r, as in `returns`."""
    whiten: bool = True
    """Scale to mean 0 and variance 1; False: the estimates as they are."""


class WhitenAdvantage(Strict):
    """The sample-level advantage on every token, whitened over the batch's valid tokens (REINFORCE++ baseline)."""

    kind: Literal["whiten"] = "whiten"


class LeaveOneOutAdvantage(Strict):
    """RLOO (arXiv 2402.14740) with the KL penalty in the reward: R_i - beta_r sum_t (old - reference), minus the mean
    of the same over the other rows of the group."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    kl: PositiveFloat = 0.01
    """beta_r. Without a penalty use `curate.advantage: {sql: rloo}`, which needs no reference."""


TokenAdvantage = Annotated[
    ReturnsAdvantage | GaeAdvantage | WhitenAdvantage | LeaveOneOutAdvantage, Field(discriminator="kind")
]


class CriticConfig(Strict):
    """A value head on a copy of the policy's backbone, carried across rounds; its loss is `objective.value`."""

    lr: PositiveFloat = 1e-5
    """Constant; betas, decay and clipping are the policy's."""
    warmup_updates: NonNegativeInt = 0
    """Updates of the critic alone before the policy moves."""


class LrSchedule(Strict):
    """Learning rate over updates. Its horizon is its own, never `rounds`, so that more rounds rerun nothing."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Course after the warm-up: constant, or falling to `floor` in a line or in half a cosine."""
    warmup: NonNegativeInt = 0
    """Updates of linear rise: update u (from 0) has (u + 1) / (warmup + 1) of the learning rate, never 0."""
    horizon: PositiveInt | None = None
    """Updates after which linear and cosine reach `floor`; needed by them, refused by constant."""
    floor: NonNegativeFloat = 0.0
    """Share of the learning rate that remains after the horizon."""

    @model_validator(mode="after")
    def _horizon_after_warmup(self) -> "LrSchedule":
        if self.horizon is not None and self.horizon <= self.warmup:
            raise ValueError(f"schedule.horizon {self.horizon} must exceed schedule.warmup {self.warmup}")
        return self


class OptimizerConfig(Strict):
    """AdamW."""

    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Times the learning rate: what each update takes off every matrix."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradient norm above which gradients are scaled down; None: never."""
    schedule: LrSchedule = LrSchedule()
    """How the learning rate moves over updates."""


class TrainConfig(Strict):
    """One round's updates."""

    objective: Objective
    """What is minimised."""
    advantage: TokenAdvantage | None = None
    """Token-level advantages, made by the trainer from the batch's rewards; None: the curated ones."""
    objective_horizon: PositiveInt | None = None
    """Updates after which a schedule inside the objective (`select: signal_top` with `final`) is done; needed by it."""
    epochs: PositiveInt = 1
    """Passes over the batch."""
    minibatches: PositiveInt = 1
    """Optimiser updates per epoch; fewer where fewer rows, or fewer groups or pairs that must stay whole, are there."""
    micro_tokens: PositiveInt = 16384
    """Most tokens (padding included) in one forward and backward; the result does not depend on it."""
    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of the models' layers; liger: fused ones of `liger-kernel`, on a GPU."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How a gradient moves the weights."""
    critic: CriticConfig | None = None
    """Needed by `advantage.kind: gae`; refused otherwise."""
    skip_without_signal: bool = True
    """A batch whose rows cannot move the policy (every advantage or weight 0, no other term) passes it on unchanged,
    with a notice. False: the optimiser still steps, on its momentum. A batch without rows is always passed on."""

    @model_validator(mode="after")
    def _objective_schedule_has_a_horizon(self) -> "TrainConfig":
        select = self.objective.select
        scheduled = select.kind == "signal_top" and select.final is not None
        if scheduled != (self.objective_horizon is not None):
            raise ValueError(
                "train.objective_horizon and a `final` in train.objective.select go together: set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _critic_has_a_loss(self) -> "TrainConfig":
        if (self.critic is None) != (self.objective.value is None):
            raise ValueError("train.critic and train.objective.value go together: set both, or neither")
        return self

    def kl_in_reward(self) -> float:
        """beta_r: weight of the penalty (old - reference log-prob) in the reward."""
        match self.advantage:
            case ReturnsAdvantage(kl=kl) | GaeAdvantage(kl=kl) | LeaveOneOutAdvantage(kl=kl):
                return kl
        return 0.0

    def reads(self) -> frozenset[str]:
        """Of what curation's SQL makes (reward, advantage, route, pair_id), the columns that decide the update."""
        objective = self.objective
        made_here = self.advantage is not None and self.advantage.kind in ("returns", "gae", "leave_one_out")
        routed = objective.anchors.kind != "none" or (
            objective.ratio is not None and objective.ratio.kind == "fibre_domain"
        )
        read = {
            "advantage": objective.reads_advantage() and not made_here,
            "reward": made_here or objective.preference.kind == "copg",
            "route": routed,
            "pair_id": objective.compares_pairs(),
        }
        return frozenset(name for name, is_read in read.items() if is_read)

    def needs_reference(self) -> bool:
        """Whether a reference policy's log-probs enter: a KL term, a preference loss, or a KL penalty in the reward."""
        return self.kl_in_reward() > 0.0 or self.objective.kl.kind != "none" or self.objective.preference.kind != "none"
