"""The parts of an objective's token loss: ratio, gate, aggregation, KL, correction, selection.

Every part is written as a mapping with `kind`, or as the kind's name alone when its defaults are meant.
Formulas and their sources stand beside the functions in `rollway.objectives`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rollway.config.base import Strict


def expand(value: Any) -> Any:
    """A kind's name alone stands for the mapping of that kind with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


class Off(Strict):
    """A part that the objective does without."""

    kind: Literal["none"] = "none"


class NoRatio(Strict):
    """The log-probability itself is weighted: REINFORCE, RLOO, supervised fine-tuning."""

    kind: Literal["none"] = "none"


class TokenRatio(Strict):
    """exp(logp - old logp) of each token (PPO, arXiv 1707.06347)."""

    kind: Literal["token"] = "token"
    denominator: Literal["old", "behavior"] = "old"
    """old: the trainer's log-probs at the start of the update; behavior: those of whoever sampled the row (replay)."""


class SequenceRatio(Strict):
    """Geometric mean of a row's token ratios, one per row (GSPO, arXiv 2507.18071); needs a sample-level advantage."""

    kind: Literal["sequence"] = "sequence"
    denominator: Literal["old", "behavior"] = "old"
    """As in `token`."""


class SequenceTokenRatio(Strict):
    """GSPO-token: the value of the sequence ratio, the gradient of each token; allows token-level advantages."""

    kind: Literal["sequence_token"] = "sequence_token"
    denominator: Literal["old", "behavior"] = "old"
    """As in `token`."""


class FibreRatio(Strict):
    """Gated trajectory aggregate times clipped token residual (FiberPO, arXiv 2603.08239); takes no gate of its own."""

    kind: Literal["fibre"] = "fibre"
    up: PositiveFloat = 0.12
    """C+: budget of the mean log-ratio of tokens that rose, nats."""
    down: PositiveFloat = 0.08
    """C-: budget of the mean log-ratio of tokens that fell, nats."""
    residual: PositiveFloat = 0.05
    """eps: clip width of a token's residual around its trajectory, nats."""


class Budget(Strict):
    """Budgets of one level of the domain form, nats."""

    up: PositiveFloat
    """C+ of this level."""
    down: PositiveFloat
    """C- of this level."""


class FibreDomainRatio(Strict):
    """FiberPO with four levels: domain, prompt group, trajectory, token (reconstructed). Rows of a domain interact."""

    kind: Literal["fibre_domain"] = "fibre_domain"
    domain: Budget = Budget(up=0.05, down=0.04)
    """Budgets of the domain's aggregate."""
    group: Budget = Budget(up=0.08, down=0.06)
    """Budgets of the prompt group around its domain."""
    trajectory: Budget = Budget(up=0.12, down=0.09)
    """Budgets of the trajectory around its group."""
    residual: PositiveFloat = 0.05
    """eps: clip width of a token's residual, nats."""


class TotalVariationRatio(Strict):
    """Ratio clipped by what the other tokens of the row leave of a total-variation budget (APC-Obj of FiberPO)."""

    kind: Literal["total_variation"] = "total_variation"
    delta: PositiveFloat = 0.2
    """Budget per token: a row of T tokens may spend T delta of sum |r - 1|."""


AnyRatio = Annotated[
    NoRatio | TokenRatio | SequenceRatio | SequenceTokenRatio | FibreRatio | FibreDomainRatio | TotalVariationRatio,
    Field(discriminator="kind"),
]
RatioName = Literal["none", "token", "sequence", "sequence_token", "fibre", "fibre_domain", "total_variation"]
Ratio = Annotated[AnyRatio, BeforeValidator(expand, json_schema_input_type=RatioName | AnyRatio)]


class NoGate(Strict):
    """The plain policy gradient: -A logp without a ratio, -A r with one."""

    kind: Literal["none"] = "none"


class SftGate(Strict):
    """Negative log-likelihood: -logp, whatever the advantage."""

    kind: Literal["sft"] = "sft"


class DftGate(Strict):
    """-sg(pi) logp: the likelihood of a token, learnt in proportion to its probability (DFT, arXiv 2508.05629)."""

    kind: Literal["dft"] = "dft"


class OneTokenGate(Strict):
    """Every token a bandit of one step (OTR, arXiv 2509.26313): candidates are drawn from the current policy, the row's
    own token is worth 1 and every other `beta`, and the policy gradient of that is taken."""

    kind: Literal["one_token"] = "one_token"
    candidates: PositiveInt | None = 256
    """K: tokens drawn at each position, with replacement; None: all of them, each as often as its probability says."""
    kappa: PositiveFloat = 1.3
    """Temperature at which they are drawn, beside that of the rollouts; their log-probs are those of the latter."""
    beta: float = Field(-0.1, lt=1.0, allow_inf_nan=False)
    """Reward of a token that is not the row's own."""


IMITATING = ("sft", "dft", "one_token")
"""Gates that take a row's tokens for what should have been written: no ratio, no advantage."""


class ClipGate(Strict):
    """Pessimistic clipping of the ratio to [1 - low, 1 + high] (PPO; DAPO and NGRPO use two widths)."""

    kind: Literal["clip"] = "clip"
    low: NonNegativeFloat = 0.2
    """Width below 1."""
    high: NonNegativeFloat = 0.2
    """Width above 1."""


class DualClipGate(Strict):
    """Clipping whose loss is bounded by -c A where A < 0 (arXiv 1912.09729)."""

    kind: Literal["dual_clip"] = "dual_clip"
    low: NonNegativeFloat = 0.2
    """Width below 1."""
    high: NonNegativeFloat = 0.2
    """Width above 1."""
    c: float = Field(3.0, gt=1.0)
    """Largest ratio that still counts against a token of negative advantage."""


class SoftGate(Strict):
    """Sigmoid of the ratio in place of the clip (SAPO, arXiv 2511.20347)."""

    kind: Literal["soft"] = "soft"
    tau_pos: PositiveFloat = 1.0
    """Sharpness where A > 0."""
    tau_neg: PositiveFloat = 1.05
    """Sharpness where A <= 0."""


class CispoGate(Strict):
    """Constant clipped ratio times -A logp: no gradient is dropped (CISPO, arXiv 2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    low: NonNegativeFloat = 1.0
    """Width below 1; 1 is off."""
    high: NonNegativeFloat = 0.28
    """Width above 1."""


class FixedDual(Strict):
    """The penalty's weight stays as it is."""

    kind: Literal["fixed"] = "fixed"


class AscentDual(Strict):
    """The penalty's weight rises while the measured variance exceeds its budget (R2VPO, eq. 4; reconstructed)."""

    kind: Literal["ascent"] = "ascent"
    delta: NonNegativeFloat = 0.04
    """Budget of the ratio's variance."""
    eta: PositiveFloat = 1.0
    """Step of the dual variable."""
    lam_max: PositiveFloat = 100.0
    """Largest value of the dual variable."""
    every: Literal["update", "round"] = "update"
    """How often the dual variable moves."""
    versions: PositiveInt = 1
    """Dual variables, one per age of the rows (the last one for all older rows); 1: a single one."""


AnyDual = Annotated[FixedDual | AscentDual, Field(discriminator="kind")]
Dual = Annotated[AnyDual, BeforeValidator(expand, json_schema_input_type=Literal["fixed", "ascent"] | AnyDual)]


class VarianceGate(Strict):
    """-(r A - lam (r - 1)^2): a penalty on the ratio's variance in place of the clip (R2VPO, arXiv 2601.03320)."""

    kind: Literal["variance"] = "variance"
    lam: NonNegativeFloat = 1.0
    """Weight of the penalty: under `dual: fixed` the weight itself, under `ascent` only the first value of the dual
    variable, so that another value in a later round of a run changes nothing."""
    centre: Literal["one", "mean"] = "one"
    """Around what the ratio varies: 1, or its mean over the batch's valid tokens."""
    dual: Dual = AscentDual()
    """How the weight moves."""


AnyGate = Annotated[
    NoGate | SftGate | DftGate | OneTokenGate | ClipGate | DualClipGate | SoftGate | CispoGate | VarianceGate,
    Field(discriminator="kind"),
]
GateName = Literal["none", "sft", "dft", "one_token", "clip", "dual_clip", "soft", "cispo", "variance"]
Gate = Annotated[AnyGate, BeforeValidator(expand, json_schema_input_type=GateName | AnyGate)]

Weights = Literal["denominator", "numerator"]


class TokenMean(Strict):
    """Sum over the kept tokens of the batch / their number."""

    kind: Literal["token_mean"] = "token_mean"
    weights: Weights = "denominator"
    """Whether row weights scale the numerator alone or also count in the denominator (sum of w x tokens)."""


class SeqMeanTokenMean(Strict):
    """Mean over rows of each row's mean over its kept tokens."""

    kind: Literal["seq_mean_token_mean"] = "seq_mean_token_mean"
    weights: Weights = "denominator"
    """Whether row weights scale the numerator alone or also count in the denominator (sum of w)."""
    empty: Literal["leave_out", "zero"] = "leave_out"
    """Rows without a kept token: left out of the mean, or counted in it as 0."""


class SeqMeanTokenSum(Strict):
    """Mean over rows of each row's sum over its kept tokens."""

    kind: Literal["seq_mean_token_sum"] = "seq_mean_token_sum"
    weights: Weights = "denominator"
    """As in `seq_mean_token_mean`."""
    empty: Literal["leave_out", "zero"] = "leave_out"
    """As in `seq_mean_token_mean`."""


class SeqSumConst(Strict):
    """Sum over kept tokens / (rows x l_max); rows without tokens count (Dr.GRPO, arXiv 2503.20783)."""

    kind: Literal["seq_sum_const"] = "seq_sum_const"
    l_max: PositiveInt
    """Constant that every row's sum is divided by: the generation cap, tokens."""
    weights: Weights = "denominator"
    """As in `seq_mean_token_mean`."""


class GroupMeanTokenSum(Strict):
    """Mean over groups of the weighted sum over a group's rows of each row's sum over its kept tokens (SCOPE, arXiv
    2604.10688, eq. 6). Groups without a kept token are left out."""

    kind: Literal["group_mean_token_sum"] = "group_mean_token_sum"

    @property
    def weights(self) -> Weights:
        """A group's weights scale its rows, and nothing divides by them."""
        return "numerator"


AnyAggregate = Annotated[
    TokenMean | SeqMeanTokenMean | SeqMeanTokenSum | SeqSumConst | GroupMeanTokenSum, Field(discriminator="kind")
]
AggregateName = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_const", "group_mean_token_sum"
]
Aggregate = Annotated[AnyAggregate, BeforeValidator(expand, json_schema_input_type=AggregateName | AnyAggregate)]


class KlPenalty(Strict):
    """beta times a per-token estimator of the divergence from the reference, added to the token loss."""

    kind: Literal["k1", "k2", "k3"]
    """Estimator. As a loss k1 does nothing in expectation (its gradient has mean 0); k2 has the KL's own, on-policy."""
    beta: PositiveFloat
    """Weight."""


AnyKl = Annotated[Off | KlPenalty, Field(discriminator="kind")]
Kl = Annotated[AnyKl, BeforeValidator(expand, json_schema_input_type=Literal["none"] | AnyKl)]


class Correction(Strict):
    """Importance weights between rollout engine and trainer, exp(old - behavior logp); never on the KL term."""

    kind: Literal["tis", "mis"]
    """tis: truncated at the cap; mis: 0 where the cap is exceeded."""
    level: Literal["token", "sequence"] = "token"
    """One weight per token, or the row's product on all of its tokens."""
    cap: PositiveFloat = 2.0
    """Largest weight."""
    weighs: Literal["all", "policy"] = Field("all", exclude_if=lambda value: value == "all")
    """all: the policy's loss and the divergence from a teacher beside it; policy: the former alone."""


AnyCorrection = Annotated[Off | Correction, Field(discriminator="kind")]
CorrectionName = Literal["none", "tis", "mis"]
AnyCorrectionPart = Annotated[
    AnyCorrection, BeforeValidator(expand, json_schema_input_type=CorrectionName | AnyCorrection)
]


class AllTokens(Strict):
    """Every valid token is trained on."""

    kind: Literal["all"] = "all"


class EntropyTop(Strict):
    """Only the share of the batch's valid tokens with the highest policy entropy (arXiv 2506.01939)."""

    kind: Literal["entropy_top"] = "entropy_top"
    share: float = Field(0.2, gt=0.0, le=1.0)
    """Share of valid tokens kept."""


class SignalTop(Strict):
    """Only the share of the batch's valid tokens with the largest |advantage| x entropy (D3S, arXiv 2509.22115)."""

    kind: Literal["signal_top"] = "signal_top"
    share: float = Field(0.1, gt=0.0, le=1.0)
    """Share of valid tokens kept when training starts."""
    final: float | None = Field(0.5, gt=0.0, le=1.0)
    """Share kept when training ends, reached linearly; None: `share` throughout."""


class SgdDirection(Strict):
    """The step is the token's own gradient."""

    kind: Literal["sgd"] = "sgd"


class AdamDirection(Strict):
    """The step is Adam's, with moments kept per token id."""

    kind: Literal["adam"] = "adam"
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


AnyDirection = Annotated[SgdDirection | AdamDirection, Field(discriminator="kind")]
Direction = Annotated[
    AnyDirection, BeforeValidator(expand, json_schema_input_type=Literal["sgd", "adam"] | AnyDirection)
]


class CurvatureTrust(Strict):
    """Drops tokens whose predicted change of objective or policy is too large (CAPO, arXiv 2510.00819)."""

    kind: Literal["curvature"] = "curvature"
    level: Literal["token", "sequence", "batch"] = "token"
    """What is judged, and kept or dropped, as a whole: a token, a completion, or all rows of an optimiser step."""
    tau_f: NonNegativeFloat = 1e-4
    """Threshold of the policy's change m_F; .inf: none. Each level has its own scale."""
    tau_h: NonNegativeFloat = 0.01
    """Threshold of the objective's change m_H; .inf: none."""
    sided: Literal["two", "one"] = "two"
    """two: |m_H| < tau_h; one: 0 <= m_H < tau_h."""
    k: PositiveInt = 50
    """Logits per token that the quantities are computed on: the k largest."""
    direction: Direction = SgdDirection()
    """Model of the optimiser's step."""
    chunk: PositiveInt = 256
    """Tokens handled at once; the result does not depend on it."""


AnySelect = Annotated[AllTokens | EntropyTop | SignalTop | CurvatureTrust, Field(discriminator="kind")]
SelectName = Literal["all", "entropy_top", "signal_top", "curvature"]
Select = Annotated[AnySelect, BeforeValidator(expand, json_schema_input_type=SelectName | AnySelect)]
