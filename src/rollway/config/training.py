"""The training stage: objective, token-level advantages, optimiser, batching."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollway.config.base import Strict
from rollway.config.distillation import Sampled, TopK
from rollway.config.objectives import Objective
from rollway.config.teachers import OtherModel, TeacherCheck


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


class TeacherAdvantage(Strict):
    """The reverse KL to a teacher as a reward on every token: r = kappa (ln P - ln Q), and what later tokens earn
    (arXiv 2604.00626, eq. 6, 7 and 9). Reads the teacher's log-prob of the sampled tokens."""

    kind: Literal["teacher"] = "teacher"
    kappa: PositiveFloat = 1.0
    """Weight of the teacher's reward."""
    extrapolate: PositiveFloat = 1.0
    """lam of G-OPD: kappa (lam (ln P - ln ref) - (ln Q - ln ref)); above 1 goes past the teacher, and needs a reference
    policy."""
    gamma: float = Field(0.0, ge=0.0, le=1.0)
    """Discount of later tokens' rewards, which are added; 0: none are."""
    mean: bool = False
    """Divide by the sum of the discounts: the mean of the rewards from here on (MiniLLM in its public trainer)."""
    from_next: bool = False
    """Leave a token's own reward out (MiniLLM's long part, arXiv 2306.08543)."""
    with_curated: bool = False
    """Add the advantage that curation made of the environment's reward."""

    @model_validator(mode="after")
    def _later_tokens_count(self) -> "TeacherAdvantage":
        if self.gamma == 0.0 and (self.mean or self.from_next):
            raise ValueError(
                "advantage.mean and from_next speak of later tokens, and gamma is 0: set it, or leave them out"
            )
        return self


TokenAdvantage = Annotated[
    ReturnsAdvantage | GaeAdvantage | WhitenAdvantage | LeaveOneOutAdvantage | TeacherAdvantage,
    Field(discriminator="kind"),
]


class LiveTeacher(Strict):
    """A second model in the trainer, which says anew of every step's rows what a stored teacher said once."""

    kind: Literal["live"] = "live"
    model: OtherModel | None = Field(None, exclude_if=lambda value: value is None)
    """Another model with the policy's tokenizer, never trained; None: the policy's own, as `weights` says."""
    weights: Literal["initial", "ema", "policy", "trust_region", "synced"] = "initial"
    """initial: the policy of round 0; ema: the moving average of the policy (`train.ema`); policy: the policy as it is
    at each step, without a gradient; trust_region: the policy of round 0 with its logits moved towards the policy's;
    synced: the policy that the first round with this teacher started from, replaced by the current one every `sync`
    rounds."""
    sync: PositiveInt | None = Field(None, exclude_if=lambda value: value is None)
    """Only of synced: rounds between replacements; None: there are none. A fork's rounds count from its own first."""
    context: Literal["policy", "privileged"] = "policy"
    """What it reads before the completion: what the policy read, or the batch's column `teacher_prompt_tokens`."""
    mix: float = Field(0.05, gt=0.0, lt=1.0)
    """Only of trust_region: the share of the policy's logits, 1 - mix that of the initial ones (SDPO)."""
    check: TeacherCheck | None = Field(TeacherCheck(), exclude_if=lambda value: value == TeacherCheck())
    """Only with `model`: whether it is any better than the policy, before anything is trained on it. Where the scorer
    that `curate.teacher` names stands for it (kind live, or the same model and context), that one's own `check` is
    meant. None: nobody looks."""

    @model_validator(mode="after")
    def _can_differ_from_the_policy(self) -> "LiveTeacher":
        if self.model is not None and self.weights != LiveTeacher.model_fields["weights"].default:
            raise ValueError(
                f"train.teacher.weights: {self.weights} is the policy's own, and `model` names another; remove one"
            )
        if self.model is None and self.check != TeacherCheck():
            raise ValueError(
                "train.teacher.check has no effect without `model`: a policy of the run in a context is checked as its "
                "scorer says (score.scorers.NAME.check); remove it"
            )
        if self.weights == "policy" and self.context == "policy":
            raise ValueError(
                "train.teacher.weights: policy, which reads what the policy reads, says what the policy says: set "
                "`context: privileged`, or another teacher"
            )
        if self.weights != "trust_region" and self.mix != LiveTeacher.model_fields["mix"].default:
            raise ValueError("train.teacher.mix has no effect without `weights: trust_region`; remove it")
        if self.weights != "synced" and self.sync is not None:
            raise ValueError("train.teacher.sync has no effect without `weights: synced`; remove it")
        return self


class CriticConfig(Strict):
    """A value head on a copy of the policy's backbone, carried across rounds; its loss is `objective.value`."""

    lr: PositiveFloat = 1e-5
    """Constant; betas, decay and clipping are the policy's."""
    warmup_updates: NonNegativeInt = 0
    """Updates of the critic alone before the policy moves."""


class Guard(Strict):
    """Steps that are not taken because of what is measured just before them. A step that is skipped leaves weights,
    moments and the course of the learning rate as they are."""

    loss_spike: PositiveFloat | None = None
    """Standard deviations (of the losses of the last `window` steps; 0.001 at least) that a step's loss may lie from
    their mean. Steps are judged once 8 are known, over all rounds."""
    window: int = Field(32, ge=8)
    """Only with `loss_spike`: steps that it looks back at."""
    kl: PositiveFloat | None = None
    """Most nats per token, KL(old || current) over a step's tokens (the metric `kl_old`). It is 0 at a round's first
    step, so it needs `epochs` or `minibatches` above 1."""
    kl_reference: PositiveFloat | None = None
    """Most nats per token, KL(current || reference) over a step's tokens (the metric `kl_reference`); only where
    something else refers to a reference policy."""
    then: Literal["stop", "skip"] = "stop"
    """stop: the stage ends as at a loss that is not finite; skip: the step is left out, with a notice and the metric
    `guard_skipped`."""

    @model_validator(mode="after")
    def _looks_at_something(self) -> "Guard":
        if self.loss_spike is None and self.kl is None and self.kl_reference is None:
            raise ValueError("guard: looks at nothing; set loss_spike, kl or kl_reference, or remove it")
        if self.loss_spike is None and "window" in self.model_fields_set:
            raise ValueError("guard.window has no effect without loss_spike; remove it")
        return self


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
    """Updates after which a schedule inside the objective (`select: signal_top` or `imitate` with `final`) is done;
    needed by it."""
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
    reference: Literal["initial", "round"] = "initial"
    """What KL terms, preferences and penalties refer to. initial: the policy of round 0; round: the policy that the
    round starts from, so that the reference is renewed with each round (online DPO)."""
    teacher: LiveTeacher | None = None
    """Where `objective.distill` takes the teacher from; None: the columns that curation carried over from scoring."""
    ema: float | None = Field(None, gt=0.0, lt=1.0)
    """Rate of a moving average of the weights, moved after each update and kept beside the policy under the name `ema`;
    None: there is none."""
    guard: Guard | None = Field(None, exclude_if=lambda value: value is None)
    """Steps that are refused; None: those alone whose loss or gradient is not finite, which always stop the stage."""
    deterministic: bool = Field(False, exclude_if=lambda value: value is False)
    """Only operations that give the same bits every time, slower ones where there is a choice; one that has no such
    form stops the stage. On the CPU bits depend on the number of threads alone, with or without it."""
    skip_without_signal: bool = True
    """A batch whose rows cannot move the policy (every advantage or weight 0, no other term) passes it on unchanged,
    with a notice. False: the optimiser still steps, on its momentum. A batch without rows is always passed on."""

    @model_validator(mode="after")
    def _objective_schedule_has_a_horizon(self) -> "TrainConfig":
        select = self.objective.select
        imitate = self.objective.imitate
        scheduled = (select.kind == "signal_top" and select.final is not None) or (
            imitate is not None and imitate.final is not None
        )
        if scheduled != (self.objective_horizon is not None):
            raise ValueError(
                "train.objective_horizon and a `final` in train.objective.select or imitate go together: set both, or "
                "neither"
            )
        return self

    @model_validator(mode="after")
    def _imitated_rows_have_no_advantage(self) -> "TrainConfig":
        if self.objective.imitate is not None and self.advantage is not None and self.advantage.kind != "teacher":
            raise ValueError(
                f"train.advantage {self.advantage.kind} is made over all rows, and those that objective.imitate copies "
                "have none: use curate.advantage"
            )
        return self

    @model_validator(mode="after")
    def _the_renewed_reference_is_read(self) -> "TrainConfig":
        if self.reference == "round" and not self.refers():
            raise ValueError("train.reference: nothing refers to a policy; leave it out")
        if self.reference == "round" and self.kl_in_reward() > 0.0:
            raise ValueError(
                "train.reference: round makes the KL penalty in the reward 0 (old and reference log-probs are the "
                "same): use initial"
            )
        steps = self.epochs * self.minibatches
        if self.reference == "round" and steps == 1 and self.objective.kl.kind in ("k2", "k3"):
            raise ValueError(
                "train.reference: round is the policy itself at the round's only step, where kl "
                f"{self.objective.kl.kind} has no gradient: use initial, or several minibatches"
            )
        return self

    @model_validator(mode="after")
    def _the_guard_can_see_it(self) -> "TrainConfig":
        guard = self.guard
        if guard is not None and guard.kl is not None and self.epochs * self.minibatches == 1:
            raise ValueError(
                "train.guard.kl has no effect: a round of one step starts it from the old policy itself; raise epochs "
                "or minibatches, or remove it"
            )
        if guard is not None and guard.kl_reference is not None and not self.refers():
            raise ValueError("train.guard.kl_reference: nothing refers to a reference policy; remove it")
        return self

    @model_validator(mode="after")
    def _critic_has_a_loss(self) -> "TrainConfig":
        if (self.critic is None) != (self.objective.value is None):
            raise ValueError("train.critic and train.objective.value go together: set both, or neither")
        return self

    @model_validator(mode="after")
    def _the_teacher_can_say_it(self) -> "TrainConfig":
        distill, live = self.objective.distill, self.teacher
        if live is not None and distill is None:
            raise ValueError("train.teacher: nothing asks it; set train.objective.distill, or remove it")
        if live is not None and live.weights == "synced" and self.refers() and self.reference == "initial":
            raise ValueError(
                "train.teacher.weights: synced is one model beside the policy, and the objective refers to another, "
                "the initial policy: set `kl: none` (and no preference), or another teacher"
            )
        if live is not None and live.weights == "ema" and self.ema is None:
            raise ValueError("train.teacher.weights: ema is the moving average of the policy; set train.ema, its rate")
        if distill is None:
            return self
        estimate = distill.estimate
        if live is None and distill.needs_live():
            raise ValueError(
                f"train.objective.distill.estimate {estimate.kind} asks for what stored columns do not hold: set "
                "`train.teacher: {kind: live}`, or estimate topk of the teacher"
            )
        if live is None and distill.samples_at_own_temperature():
            raise ValueError(
                "train.objective.distill.estimate.at: distill takes log-probs at its own temperature, and stored ones "
                "are at the rollouts': set `train.teacher: {kind: live}`, or `at: rollouts`"
            )
        if isinstance(estimate, TopK) and live is not None and estimate.k is None:
            raise ValueError("train.objective.distill.estimate.k: a live teacher needs to know how many tokens; set it")
        tail = isinstance(estimate, TopK) and estimate.outside == "tail"
        if live is None and tail and distill.temperature != 1.0 and "teacher_logprob" not in self.reads_teacher():
            raise ValueError(
                "train.objective.distill.temperature: the tail of stored log-probs at another temperature is unknown: "
                "use `outside: renormalise` or a live teacher, or remove it"
            )
        return self

    def unchecked(self) -> "TrainConfig":
        """As far as its updates go: how a live teacher is checked before them is no part of them."""
        if self.teacher is None:
            return self
        return self.model_copy(update={"teacher": self.teacher.model_copy(update={"check": TeacherCheck()})})

    def reads_teacher(self) -> frozenset[str]:
        """Columns that scoring's teacher must have given and curation must carry into the batch."""
        distill, live = self.objective.distill, self.teacher
        read = set(distill.reads()) if distill is not None and live is None else set[str]()
        read |= {"teacher_logprob"} if self.advantage_of_teacher() else set()
        read |= {"teacher_prompt_tokens"} if live is not None and live.context == "privileged" else set()
        return frozenset(read)

    def top_k_temperature(self, sampling: float) -> float:
        """At which a scorer must have stored the top k: that of sampling where the same scorer's log-probs of sampled
        tokens are read (MiniLLM, EOPD), else 1."""
        return sampling if "teacher_logprob" in self.reads_teacher() else 1.0

    def entropy_temperature(self, sampling: float) -> float:
        """At which a live teacher's entropy is taken: as a stored one's, that of sampling where its log-probs of
        sampled tokens are read at it (EOPD), else 1 (SRPO)."""
        distill = self.objective.distill
        sampled = distill is not None and isinstance(distill.estimate, Sampled) and distill.estimate.at == "rollouts"
        return sampling if sampled or self.advantage_of_teacher() else 1.0

    def advantage_of_teacher(self) -> bool:
        """Whether the tokens' advantages are a teacher's."""
        return isinstance(self.advantage, TeacherAdvantage)

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
        of_teacher = isinstance(self.advantage, TeacherAdvantage) and not self.advantage.with_curated
        routed = objective.is_routed() or (objective.ratio is not None and objective.ratio.kind == "fibre_domain")
        read = {
            "advantage": objective.reads_advantage() and not made_here and not of_teacher,
            "reward": made_here or objective.preference.kind == "copg",
            "route": routed,
            "pair_id": objective.compares_pairs(),
        }
        return frozenset(name for name, is_read in read.items() if is_read)

    def needs_reference(self) -> bool:
        """Whether the policy of round 0 is read: by what refers to it, or as the live teacher itself."""
        live = self.teacher if self.teacher is not None and self.teacher.model is None else None
        taught = live is not None and live.weights in ("initial", "trust_region")
        return taught or (self.refers() and self.reference == "initial")

    def refers(self) -> bool:
        """Whether anything refers to a reference policy: a KL term, a preference loss, a KL penalty in the reward, or a
        teacher's reward that is extrapolated from it."""
        return (
            self.extrapolates()
            or self.kl_in_reward() > 0.0
            or self.objective.kl.kind != "none"
            or self.objective.preference.kind not in ("none", "spin")
        )

    def extrapolates(self) -> bool:
        """Whether a teacher's reward refers to the reference policy (G-OPD)."""
        return isinstance(self.advantage, TeacherAdvantage) and self.advantage.extrapolate != 1.0
