"""The token-level half of a method: ratio x gate x aggregation, with KL, corrections, selections and preference losses.

Every part is written as a mapping with `kind`, or as the kind's name alone when its defaults are meant:
`objective: {ratio: token, gate: {kind: clip, low: 0.16, high: 0.24}, aggregate: token_mean, kl: none}`.
Formulas and their sources stand beside the functions in `rollway.objectives`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rollway.config.base import Strict

ROUTES = ("policy", "expert")
"""Names a curated row's `route` may have for the objectives here; a batch holds their index. No route is `policy`."""


def _expand(value: Any) -> Any:
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
Ratio = Annotated[AnyRatio, BeforeValidator(_expand, json_schema_input_type=RatioName | AnyRatio)]


class NoGate(Strict):
    """The plain policy gradient: -A logp without a ratio, -A r with one."""

    kind: Literal["none"] = "none"


class SftGate(Strict):
    """Negative log-likelihood: -logp, whatever the advantage."""

    kind: Literal["sft"] = "sft"


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
Dual = Annotated[AnyDual, BeforeValidator(_expand, json_schema_input_type=Literal["fixed", "ascent"] | AnyDual)]


class VarianceGate(Strict):
    """-(r A - lam (r - 1)^2): a penalty on the ratio's variance in place of the clip (R2VPO, arXiv 2601.03320)."""

    kind: Literal["variance"] = "variance"
    lam: NonNegativeFloat = 1.0
    """Initial weight of the penalty."""
    centre: Literal["one", "mean"] = "one"
    """Around what the ratio varies: 1, or its mean over the batch's valid tokens."""
    dual: Dual = AscentDual()
    """How the weight moves."""


AnyGate = Annotated[
    NoGate | SftGate | ClipGate | DualClipGate | SoftGate | CispoGate | VarianceGate, Field(discriminator="kind")
]
GateName = Literal["none", "sft", "clip", "dual_clip", "soft", "cispo", "variance"]
Gate = Annotated[AnyGate, BeforeValidator(_expand, json_schema_input_type=GateName | AnyGate)]

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


AnyAggregate = Annotated[TokenMean | SeqMeanTokenMean | SeqMeanTokenSum | SeqSumConst, Field(discriminator="kind")]
AggregateName = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]
Aggregate = Annotated[AnyAggregate, BeforeValidator(_expand, json_schema_input_type=AggregateName | AnyAggregate)]


class KlPenalty(Strict):
    """beta times a per-token estimator of the divergence from the reference, added to the token loss."""

    kind: Literal["k1", "k2", "k3"]
    """Estimator. As a loss k1 does nothing in expectation (its gradient has mean 0); k2 has the KL's own, on-policy."""
    beta: PositiveFloat
    """Weight."""


AnyKl = Annotated[Off | KlPenalty, Field(discriminator="kind")]
Kl = Annotated[AnyKl, BeforeValidator(_expand, json_schema_input_type=Literal["none"] | AnyKl)]


class Correction(Strict):
    """Importance weights between rollout engine and trainer, exp(old - behavior logp); never on the KL term."""

    kind: Literal["tis", "mis"]
    """tis: truncated at the cap; mis: 0 where the cap is exceeded."""
    level: Literal["token", "sequence"] = "token"
    """One weight per token, or the row's product on all of its tokens."""
    cap: PositiveFloat = 2.0
    """Largest weight."""


AnyCorrection = Annotated[Off | Correction, Field(discriminator="kind")]
CorrectionName = Literal["none", "tis", "mis"]
AnyCorrectionPart = Annotated[
    AnyCorrection, BeforeValidator(_expand, json_schema_input_type=CorrectionName | AnyCorrection)
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
    AnyDirection, BeforeValidator(_expand, json_schema_input_type=Literal["sgd", "adam"] | AnyDirection)
]


class CurvatureTrust(Strict):
    """Drops tokens whose predicted change of objective or policy is too large (CAPO, arXiv 2510.00819)."""

    kind: Literal["curvature"] = "curvature"
    tau_f: NonNegativeFloat = 1e-4
    """Threshold of the policy's change m_F; .inf: none."""
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
Select = Annotated[AnySelect, BeforeValidator(_expand, json_schema_input_type=SelectName | AnySelect)]


class TargetEntropy(Strict):
    """Mixes in a term of the correct rows, weighted to a hotter or colder old policy (DCPO, arXiv 2601.12730)."""

    kind: Literal["target_entropy"] = "target_entropy"
    entropy: NonNegativeFloat = 0.25
    """H0: entropy to hold, nats per token."""
    hot: float = Field(1.2, gt=1.0)
    """Temperature of the target policy while the last entropy is at or below H0."""
    cold: float = Field(0.8, gt=0.0, lt=1.0)
    """Temperature while it is above."""
    gap: PositiveFloat = 0.1
    """Largest |H0 - last entropy| that counts."""


AnyMixing = Annotated[Off | TargetEntropy, Field(discriminator="kind")]
Mixing = Annotated[
    AnyMixing, BeforeValidator(_expand, json_schema_input_type=Literal["none", "target_entropy"] | AnyMixing)
]


class UnitAnchors(Strict):
    """Rows routed to `expert` get ratio pi / sg(pi): -A grad logp, unclipped (DaGRPO, arXiv 2512.06337)."""

    kind: Literal["unit"] = "unit"


class ShapedAnchors(Strict):
    """Rows routed to `expert` get -A pi / (pi + gamma), unclipped (LUFFY's shaping, arXiv 2504.14945)."""

    kind: Literal["shaped"] = "shaped"
    gamma: PositiveFloat = 0.1
    """Probability at which the shaping is one half."""


AnyAnchors = Annotated[Off | UnitAnchors | ShapedAnchors, Field(discriminator="kind")]
AnchorsName = Literal["none", "unit", "shaped"]
Anchors = Annotated[AnyAnchors, BeforeValidator(_expand, json_schema_input_type=AnchorsName | AnyAnchors)]


class ValueLoss(Strict):
    """The critic's squared error, pessimistically clipped around its old values (PPO)."""

    clip: PositiveFloat | None = 0.2
    """eps_v: how far the value may move from its old one; None: plain squared error."""
    coefficient: PositiveFloat = 1.0
    """Weight beside the policy's loss."""


class DpoPreference(Strict):
    """Direct preference optimisation (arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Strength of the reference."""


class IpoPreference(Strict):
    """Identity preference optimisation (arXiv 2310.12036)."""

    kind: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """Strength of the reference: the margin aimed at is 1 / (2 beta)."""
    average: bool = False
    """Divide a row's log-ratio by its tokens, as TRL does; the paper sums."""


class CopgPreference(Strict):
    """Contrastive policy gradient on scored completions (arXiv 2406.19185)."""

    kind: Literal["copg"] = "copg"
    beta: PositiveFloat = 0.06
    """Strength of the reference."""
    form: Literal["pair", "group"] = "pair"
    """pair: the batch's pairs, eq. 3; group: all completions of a group against each other, eq. 7."""


AnyPreference = Annotated[Off | DpoPreference | IpoPreference | CopgPreference, Field(discriminator="kind")]
PreferenceName = Literal["none", "dpo", "ipo", "copg"]
Preference = Annotated[AnyPreference, BeforeValidator(_expand, json_schema_input_type=PreferenceName | AnyPreference)]


class Objective(Strict):
    """What is minimised: either ratio x gate x aggregate over tokens, or a preference loss over pairs or groups."""

    ratio: Ratio | None = None
    """What moves against the old policy; needed unless `preference` is set."""
    gate: Gate | None = None
    """How ratio and advantage make a token's loss; needed unless `preference` is set."""
    aggregate: Aggregate | None = None
    """How token losses make one number; needed unless `preference` is set."""
    kl: Kl = Off()
    """Penalty towards the reference policy."""
    correction: AnyCorrectionPart = Off()
    """Importance weights between rollout engine and trainer."""
    select: Select = AllTokens()
    """Which valid tokens are trained on."""
    mixing: Mixing = Off()
    """What is mixed into the advantage."""
    anchors: Anchors = Off()
    """How rows that no policy sampled enter."""
    entropy_bonus: NonNegativeFloat = 0.0
    """c_H: weight of the mean token entropy, subtracted from the loss; 0: off."""
    value: ValueLoss | None = None
    """The critic's loss, added; None: no critic."""
    preference: Preference = Off()
    """A loss over pairs or groups in place of ratio, gate and aggregate."""

    def corrects_behaviour(self) -> bool:
        """Whether the difference between what was sampled from and what is trained is weighted away."""
        return self.correction.kind != "none"

    @model_validator(mode="after")
    def _parts_agree(self) -> "Objective":
        if self.preference.kind != "none":
            self._check_preference()
        else:
            self._check_tokens()
        return self

    def _check_preference(self) -> None:
        kind = self.preference.kind
        given = [name for name in ("ratio", "gate", "aggregate", "value") if getattr(self, name) is not None]
        for name, off in (
            ("kl", "none"),
            ("correction", "none"),
            ("select", "all"),
            ("mixing", "none"),
            ("anchors", "none"),
        ):
            if getattr(self, name).kind != off:
                given.append(name)
        if self.entropy_bonus > 0.0:
            given.append("entropy_bonus")
        if given:
            raise ValueError(
                f"preference {kind} is a loss over whole completions, so {', '.join(given)} would do nothing: remove it"
            )

    def _check_tokens(self) -> None:
        missing = [name for name in ("ratio", "gate", "aggregate") if getattr(self, name) is None]
        if missing or self.ratio is None or self.gate is None:
            raise ValueError(f"{', '.join(missing)}: not given; set it, or set `preference`")
        ratio, gate = self.ratio.kind, self.gate.kind
        if ratio == "none" and gate not in ("none", "sft"):
            raise ValueError(f"gate {gate} acts on a ratio, and ratio is none: set `ratio: token`, or `gate: none`")
        if ratio in ("fibre", "fibre_domain", "total_variation") and gate != "none":
            raise ValueError(f"ratio {ratio} is gated already: set `gate: none`")
        if gate == "sft":
            self._check_sft(ratio)
        if self.mixing.kind != "none" and ratio == "sequence":
            raise ValueError(
                f"mixing {self.mixing.kind} makes token-level advantages, which ratio sequence cannot use: "
                "set `ratio: token` or `ratio: sequence_token`"
            )
        match self.ratio:
            case TokenRatio(denominator="behavior") | SequenceRatio(denominator="behavior"):
                corrected_twice = self.correction.kind != "none"
            case SequenceTokenRatio(denominator="behavior"):
                corrected_twice = self.correction.kind != "none"
            case _:
                corrected_twice = False
        if corrected_twice:
            raise ValueError(
                "correction weighs old against behavior log-probs, and the ratio's denominator is the latter already: "
                "remove the correction, or set `denominator: old`"
            )
        if self.anchors.kind != "none" and ratio not in ("token", "sequence", "sequence_token"):
            raise ValueError(
                f"anchors {self.anchors.kind} stand in for a missing ratio, and ratio {ratio} leaves no room for them: "
                "set `ratio: token`, or `anchors: none`"
            )
        if isinstance(self.select, SignalTop) and self.select.final == self.select.share:
            raise ValueError("select.final equals select.share, so there is no schedule: set `final: null`")

    def _check_sft(self, ratio: str) -> None:
        used = [name for name in ("correction", "mixing", "anchors") if getattr(self, name).kind != "none"]
        if ratio != "none":
            raise ValueError(f"gate sft uses no ratio, so ratio {ratio} would do nothing: set `ratio: none`")
        if self.select.kind in ("signal_top", "curvature"):
            used.append("select")
        if used:
            raise ValueError(
                f"gate sft uses no advantage and no sampled policy, so {', '.join(used)} cannot act: remove it"
            )
