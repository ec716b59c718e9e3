"""The token-level half of a method: ratio x gate x aggregation, with KL, corrections, selections and preference losses.

Every part is written as a mapping with `kind`, or as the kind's name alone when its defaults are meant:
`objective: {ratio: token, gate: {kind: clip, low: 0.16, high: 0.24}, aggregate: token_mean, kl: none}`.
Formulas and their sources stand beside the functions in `rollway.objectives`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from rollway.config.base import Strict
from rollway.config.distillation import Distill, Sampled
from rollway.config.objective_parts import (
    IMITATING,
    AdamDirection,
    Aggregate,
    AllTokens,
    AnyCorrectionPart,
    AscentDual,
    CispoGate,
    ClipGate,
    Correction,
    CurvatureTrust,
    DftGate,
    DualClipGate,
    EntropyTop,
    FibreDomainRatio,
    FibreRatio,
    Gate,
    GroupMeanTokenSum,
    Kl,
    KlPenalty,
    NoGate,
    NoRatio,
    Off,
    OneTokenGate,
    Ratio,
    Select,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqSumConst,
    SequenceRatio,
    SequenceTokenRatio,
    SftGate,
    SignalTop,
    SoftGate,
    TokenMean,
    TokenRatio,
    TotalVariationRatio,
    VarianceGate,
    expand,
)

__all__ = [
    "IMITATING",
    "ROUTES",
    "AdamDirection",
    "Aggregate",
    "AllTokens",
    "Anchors",
    "AnyCorrectionPart",
    "AscentDual",
    "CispoGate",
    "ClipGate",
    "CopgPreference",
    "Correction",
    "CurvatureTrust",
    "DftGate",
    "Distill",
    "DpoPreference",
    "DualClipGate",
    "EntropyTop",
    "FibreDomainRatio",
    "FibreRatio",
    "Gate",
    "GroupMeanTokenSum",
    "Imitation",
    "IpoPreference",
    "Kl",
    "KlPenalty",
    "Mixing",
    "NoGate",
    "NoRatio",
    "Objective",
    "Off",
    "OneTokenGate",
    "Preference",
    "Ratio",
    "Select",
    "SeqMeanTokenMean",
    "SeqMeanTokenSum",
    "SeqSumConst",
    "SequenceRatio",
    "SequenceTokenRatio",
    "SftGate",
    "ShapedAnchors",
    "SignalTop",
    "SoftGate",
    "SpinPreference",
    "TargetEntropy",
    "TokenMean",
    "TokenRatio",
    "TotalVariationRatio",
    "UnitAnchors",
    "ValueLoss",
    "VarianceGate",
]

ROUTES = ("policy", "expert", "distill", "both", "imitate")
"""Names a curated row's `route` may have for the objectives here; a batch holds their index. No route is `policy`.
`distill` rows get the distillation loss alone, `both` get it beside the policy's; `imitate` rows their likelihood."""


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
    AnyMixing, BeforeValidator(expand, json_schema_input_type=Literal["none", "target_entropy"] | AnyMixing)
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
Anchors = Annotated[AnyAnchors, BeforeValidator(expand, json_schema_input_type=AnchorsName | AnyAnchors)]


class Imitation(Strict):
    """beta x the log-likelihood of rows routed to `imitate`, summed over each one's tokens, as a mean over all groups
    of the batch (ExPO, arXiv 2507.02834, eq. 3). They get nothing else: no ratio, no advantage, no part in other
    means."""

    beta: PositiveFloat = 0.04
    """Weight beside the policy's loss."""
    final: NonNegativeFloat | None = None
    """Weight after `train.objective_horizon` updates, reached linearly; None: `beta` throughout."""
    tokens: Literal["sum", "mean"] = "sum"
    """sum: a row's whole log-likelihood, as in the paper; mean: per token, which asks for another `beta`."""


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


class SpinPreference(Strict):
    """Self-play (SPIN, arXiv 2401.01335): what others wrote against what the policy did, measured from the policy as it
    was when the round began, which wrote it."""

    kind: Literal["spin"] = "spin"
    lam: PositiveFloat = 0.1
    """Strength of the old policy."""


AnyPreference = Annotated[
    Off | DpoPreference | IpoPreference | CopgPreference | SpinPreference, Field(discriminator="kind")
]
PreferenceName = Literal["none", "dpo", "ipo", "copg", "spin"]
Preference = Annotated[AnyPreference, BeforeValidator(expand, json_schema_input_type=PreferenceName | AnyPreference)]


class Objective(Strict):
    """What is minimised: ratio x gate x aggregate over tokens, with or without a teacher's divergence; that divergence
    alone; or a preference loss over pairs or groups."""

    ratio: Ratio | None = None
    """What moves against the old policy; needed unless `preference` is set, or `distill` stands alone."""
    gate: Gate | None = None
    """How ratio and advantage make a token's loss; needed as `ratio` is."""
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
    distill: Distill | None = None
    """Divergence from a teacher, added, or alone without `ratio` and `gate`; None: no teacher."""
    imitate: Imitation | None = None
    """Log-likelihood of rows routed to `imitate`, added; None: there is none."""
    preference: Preference = Off()
    """A loss over pairs or groups in place of ratio, gate and aggregate."""

    def corrects_behaviour(self) -> bool:
        """Whether the difference between what was sampled from and what is trained is weighted away."""
        return self.correction.kind != "none"

    def divides_by_behaviour(self) -> bool:
        """Whether the ratio is that to whoever sampled, by the log-probs stored then."""
        match self.ratio:
            case TokenRatio(denominator=d) | SequenceRatio(denominator=d) | SequenceTokenRatio(denominator=d):
                return d == "behavior"
        return False

    def reads_advantage(self) -> bool:
        """Whether the loss reads an advantage; imitation and preferences do without."""
        return self.preference.kind == "none" and self.gate is not None and self.gate.kind not in IMITATING

    def compares_pairs(self) -> bool:
        """Whether the loss is one of pairs, rather than of tokens or of whole groups."""
        whole_groups = isinstance(self.preference, CopgPreference) and self.preference.form == "group"
        return self.preference.kind != "none" and not whole_groups

    def places_experts(self) -> bool:
        """Whether rows that nobody sampled have a meaning in it: as anchors, imitated, or because it forms no ratio of
        them."""
        no_ratio = (self.ratio is None or self.ratio.kind == "none") and not self.distils_samples()
        placed = self.anchors.kind != "none" or self.imitate is not None
        return placed or (no_ratio and self.correction.kind == "none")

    def distils_samples(self) -> bool:
        """Whether the distillation takes its rows for samples of the policy, which an expert's are not."""
        return self.distill is not None and (
            isinstance(self.distill.estimate, Sampled) or self.distill.importance.kind != "none"
        )

    def distils_alone(self) -> bool:
        """Whether the divergence from a teacher stands in place of a policy loss."""
        return self.distill is not None and self.ratio is None and self.gate is None

    def takes_any_prefix(self) -> bool:
        """Whether it is a divergence over the vocabulary alone, which asks of nothing how likely it was sampled."""
        return self.distils_alone() and not self.distils_samples()

    def takes_foreign_samples(self) -> bool:
        """Whether log-probs of the full vocabulary are meant, also of tokens from a truncated one: nothing divides by
        how likely a token was sampled, or a correction says it."""
        as_written = (
            self.distill is not None
            and self.distill.samples_at_own_temperature()
            and self.distill.importance.kind == "none"
        )
        return self.corrects_behaviour() or self.takes_any_prefix() or (self.distils_alone() and as_written)

    def takes_mixture(self) -> bool:
        """Whether it learns the same in expectation of tokens that a teacher had a share in."""
        return self.kl.kind == "none" and (self.corrects_behaviour() or self.takes_any_prefix())

    def is_routed(self) -> bool:
        """Whether the rows' routes decide which losses they get."""
        by_source = self.distill is not None and self.distill.experts is not None
        return self.anchors.kind != "none" or self.is_distill_routed() or by_source or self.imitate is not None

    @model_validator(mode="after")
    def _parts_agree(self) -> "Objective":
        if self.preference.kind != "none":
            self._check_preference()
        else:
            self._check_tokens()
        return self

    def _check_preference(self) -> None:
        kind = self.preference.kind
        parts = ("ratio", "gate", "aggregate", "value", "distill", "imitate")
        given = [name for name in parts if getattr(self, name) is not None]
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
        if self.distill is not None and self.distils_alone():
            self._check_distill_alone(self.distill)
            return
        missing = [name for name in ("ratio", "gate", "aggregate") if getattr(self, name) is None]
        if missing or self.ratio is None or self.gate is None:
            raise ValueError(f"{', '.join(missing)}: not given; set it, or set `preference`")
        ratio, gate = self.ratio.kind, self.gate.kind
        if ratio == "none" and gate not in ("none", *IMITATING):
            raise ValueError(f"gate {gate} acts on a ratio, and ratio is none: set `ratio: token`, or `gate: none`")
        if ratio in ("fibre", "fibre_domain", "total_variation") and gate != "none":
            raise ValueError(f"ratio {ratio} is gated already: set `gate: none`")
        if gate in IMITATING:
            self._check_imitating(gate, ratio)
        if self.imitate is not None and self.imitate.final == self.imitate.beta:
            raise ValueError("imitate.final equals imitate.beta, so there is no schedule: set `final: null`")
        if self.imitate is not None and ratio == "fibre_domain":
            raise ValueError("ratio fibre_domain takes the rows' routes for domains, and imitate for losses: drop one")
        if self.mixing.kind != "none" and ratio == "sequence":
            raise ValueError(
                f"mixing {self.mixing.kind} makes token-level advantages, which ratio sequence cannot use: "
                "set `ratio: token` or `ratio: sequence_token`"
            )
        if ratio == "sequence" and gate != "cispo":
            self._check_sequence()
        match self.ratio:
            case TokenRatio(denominator="behavior") | SequenceRatio(denominator="behavior"):
                corrected_twice = self.correction.kind != "none"
            case SequenceTokenRatio(denominator="behavior"):
                corrected_twice = self.correction.kind != "none"
            case _:
                corrected_twice = False
        weighed = self.correction.weighs if isinstance(self.correction, Correction) else "all"
        if weighed == "policy" and self.distill is None:
            raise ValueError("correction.weighs: policy has no effect without `distill`; remove it")
        if weighed == "policy" and self.distils_samples():
            raise ValueError(
                "correction.weighs: policy spares a divergence that is exact at every prefix, and `estimate: sampled` "
                "is an expectation over what was sampled: remove it, or take `estimate: topk` or `exact`"
            )
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
        if self.anchors.kind != "none" and self.distils_samples() and not self.is_distill_routed():
            raise ValueError(
                "distill takes every row for a sample of the policy, and anchors act on rows that nobody sampled: set "
                "`distill.rows: routed`"
            )

    def is_distill_routed(self) -> bool:
        """Whether only rows of some routes are distilled."""
        return self.distill is not None and self.distill.rows == "routed"

    def _check_distill_alone(self, distill: Distill) -> None:
        """Without a policy loss there is one aggregation, and nothing that reads an advantage."""
        if self.aggregate is None:
            raise ValueError("aggregate: not given; set it, for example to token_mean")
        used = [name for name in ("mixing", "anchors") if getattr(self, name).kind != "none"]
        used += ["imitate"] if self.imitate is not None else []
        used += ["select"] if self.select.kind in ("signal_top", "curvature") else []
        used += ["value"] if self.value is not None else []
        if isinstance(self.correction, Correction) and self.correction.weighs == "policy":
            used.append("correction.weighs: policy")
        if used:
            raise ValueError(
                f"distill stands alone and reads no advantage, so {', '.join(used)} cannot act: remove it, or set "
                "`ratio` and `gate`"
            )
        if distill.aggregate is not None:
            raise ValueError("distill.aggregate: distill stands alone, so set the objective's `aggregate` in its place")

    def _check_sequence(self) -> None:
        """A sequence ratio moves all tokens of its row alike, whatever is done to one of them. D3S under GSPO defines
        that (eq. 5: a row is left out when none of its tokens is kept); elsewhere it is a gate that gates nothing."""
        correction, select = self.correction, self.select
        by_token = isinstance(select, EntropyTop) or (isinstance(select, CurvatureTrust) and select.level == "token")
        acts_on_tokens = [f"select {select.kind}"] if by_token else []
        if isinstance(correction, Correction) and correction.level == "token":
            acts_on_tokens.append(f"correction {correction.kind} at level token")
        if acts_on_tokens:
            raise ValueError(
                f"{' and '.join(acts_on_tokens)} acts on single tokens, and ratio sequence is one number of all of a "
                "row's tokens, which moves those that were dropped or weighted down just as far: set "
                "`ratio: sequence_token`"
                + (", or the correction's `level: sequence`" if correction.kind != "none" else ", or `select: all`")
            )

    def _check_imitating(self, gate: str, ratio: str) -> None:
        used = [name for name in ("correction", "mixing", "anchors") if getattr(self, name).kind != "none"]
        if ratio != "none":
            raise ValueError(f"gate {gate} uses no ratio, so ratio {ratio} would do nothing: set `ratio: none`")
        if self.select.kind in ("signal_top", "curvature"):
            used.append("select")
        if self.imitate is not None:
            raise ValueError(f"gate {gate} imitates all rows alike, so imitate has no rows of its own: remove it")
        if used:
            raise ValueError(
                f"gate {gate} uses no advantage and no sampled policy, so {', '.join(used)} cannot act: remove it"
            )
