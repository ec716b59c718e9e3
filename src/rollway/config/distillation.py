"""The part of an objective that pulls the policy towards a teacher: divergence, estimate, rows and tokens it acts on.

What it reads of the teacher are columns of the batch: the log-prob of the sampled token, the k largest log-probs with
their ids, the entropy; or, with `train.teacher: live`, a second model in the trainer.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rollway.config.base import Strict
from rollway.config.divergences import Divergence, ReverseKl
from rollway.config.objective_parts import Aggregate, Off, expand


class Exact(Strict):
    """Over the whole vocabulary, a block of it at a time; needs a live teacher."""

    kind: Literal["exact"] = "exact"


class TopK(Strict):
    """Over the k most likely tokens and what is left of the probability (arXiv 2604.00626, eq. 4)."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt | None = None
    """Tokens per position; None: all that the teacher's columns hold. A live teacher needs it."""
    of: Literal["teacher", "student"] = "teacher"
    """Whose most likely tokens; the student's are known only beside a live teacher."""
    outside: Literal["tail", "renormalise"] = "tail"
    """tail: the rest is one more token, a lower bound of the full divergence; renormalise: the rest is ignored."""


class Sampled(Strict):
    """From the sampled token alone: sg(g(u)) logp, whose expected gradient on-policy is the divergence's (eq. 2, 3)."""

    kind: Literal["sampled"] = "sampled"
    granularity: Literal["token", "sequence"] = "token"
    """token: u of each token; sequence: u of the whole row, on each of its tokens (log u is clamped to +-20)."""
    at: Literal["rollouts", "distill"] = Field("rollouts", exclude_if=lambda value: value == "rollouts")
    """Temperature of both log-probs. rollouts: that of sampling, at which the policy wrote; distill:
    `distill.temperature`, of the whole vocabulary however the token was sampled (OPSD), beside a live teacher."""


AnyEstimate = Annotated[Exact | TopK | Sampled, Field(discriminator="kind")]
EstimateName = Literal["exact", "topk", "sampled"]
Estimate = Annotated[AnyEstimate, BeforeValidator(expand, json_schema_input_type=EstimateName | AnyEstimate)]


class RatioImportance(Strict):
    """r sg(g(u)) in place of sg(g(u)) logp, r = exp(logp - old): for several steps on the same rollouts."""

    kind: Literal["ratio"] = "ratio"


class TruncatedImportance(Strict):
    """sg(min(r, cap)) times a token's loss (SDPO, arXiv 2601.20802)."""

    kind: Literal["truncated"] = "truncated"
    cap: PositiveFloat = 2.0
    """Largest weight."""


class ClippedImportance(Strict):
    """PPO's clipped surrogate of r and the advantage -g(u), u of the policy that wrote: fixed over a round's steps (the
    code released with SCOPE, arXiv 2604.10688)."""

    kind: Literal["clipped"] = "clipped"
    low: float = Field(0.2, gt=0, lt=1)
    """r counts down to 1 - low where the advantage is negative."""
    high: PositiveFloat = 0.2
    """And up to 1 + high where it is positive."""
    dual: float = Field(3.0, gt=1)
    """c: where the advantage is negative, r counts up to this (arXiv 1912.09729)."""


AnyImportance = Annotated[Off | RatioImportance | TruncatedImportance | ClippedImportance, Field(discriminator="kind")]
ImportanceName = Literal["none", "ratio", "truncated", "clipped"]
Importance = Annotated[AnyImportance, BeforeValidator(expand, json_schema_input_type=ImportanceName | AnyImportance)]


class EntropyWeight(Strict):
    """Tokens count exp(-beta H), H the teacher's entropy, over its mean on the distilled tokens (SRPO)."""

    kind: Literal["entropy_weight"] = "entropy_weight"
    beta: PositiveFloat = 1.0
    """How much less a token counts for a nat of entropy more."""


class EntropyAbove(Strict):
    """Only tokens where the teacher's entropy exceeds a threshold (entropy-aware OPD; reconstructed)."""

    kind: Literal["entropy_above"] = "entropy_above"
    threshold: NonNegativeFloat
    """h, nats."""


AnyEmphasis = Annotated[Off | EntropyWeight | EntropyAbove, Field(discriminator="kind")]
EmphasisName = Literal["none", "entropy_weight"]
Emphasis = Annotated[AnyEmphasis, BeforeValidator(expand, json_schema_input_type=EmphasisName | AnyEmphasis)]


class Distill(Strict):
    """Divergence from a teacher, beside the policy's loss or, without `ratio` and `gate`, in its place."""

    divergence: Divergence = ReverseKl()
    """Between the teacher's distribution P and the policy's Q."""
    experts: Divergence | None = Field(None, exclude_if=lambda value: value is None)
    """Of rows routed to `expert`, in place of `divergence` (DistiLLM-2, arXiv 2503.07067); None: the same for all."""
    estimate: Estimate = Sampled()
    """How much of the two distributions is seen."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits, in the divergence alone; the loss is not multiplied by its square. `sampled` takes
    one only with `at: distill`."""
    weight: PositiveFloat = 1.0
    """Weight beside the policy's loss."""
    rows: Literal["all", "routed"] = "all"
    """all: every row is distilled, beside its policy loss; routed: the row's `route` says which losses it gets:
    `policy` (or none), `distill`, or `both`."""
    aggregate: Aggregate | None = None
    """How the distilled tokens make one number of their own, divided by the distilled rows or tokens alone, as the
    policy's loss then is by the rows or tokens that get it; None: their losses are added to those of the policy, under
    the objective's aggregate and its one denominator."""
    over: Literal["distilled", "batch"] = Field("distilled", exclude_if=lambda value: value == "distilled")
    """Whose rows or tokens the denominator of `aggregate` counts: the distilled ones, or all of the batch, those that
    get the policy's loss alone too."""
    importance: Importance = Off()
    """Correction for a policy that has moved since the rows were sampled."""
    emphasis: Emphasis = Off()
    """Which tokens count more, by the teacher's entropy."""
    clip: PositiveFloat | None = None
    """tau: cap on each vocabulary entry's term Q f(u), before the sum; clipped entries have no gradient (OPSD)."""

    def reads(self) -> frozenset[str]:
        """The teacher's columns that a stored teacher must have given: names of the batch table."""
        match self.estimate:
            case Sampled():
                read = {"teacher_logprob"}
            case TopK():
                read = {"teacher_topk_ids", "teacher_topk_logprobs"}
            case Exact():
                read = set[str]()
        return frozenset(read | ({"teacher_entropy"} if self.emphasis.kind != "none" else set()))

    def needs_live(self) -> bool:
        """Whether stored columns cannot give it: the whole vocabulary, or the student's own tokens."""
        return isinstance(self.estimate, Exact) or (isinstance(self.estimate, TopK) and self.estimate.of == "student")

    def samples_at_own_temperature(self) -> bool:
        """Whether the sampled token's log-probs are read at `temperature`, not at that of sampling."""
        return isinstance(self.estimate, Sampled) and self.estimate.at == "distill"

    @model_validator(mode="after")
    def _parts_agree(self) -> "Distill":
        sampled = isinstance(self.estimate, Sampled)
        if sampled and not self.samples_at_own_temperature() and self.temperature != 1.0:
            raise ValueError(
                "distill.temperature: estimate sampled sees single log-probs, which cannot be taken to another "
                "temperature: use estimate topk or exact, {kind: sampled, at: distill} beside a live teacher, or "
                "remove it"
            )
        in_ratios = isinstance(self.importance, RatioImportance | ClippedImportance)
        if self.samples_at_own_temperature() and in_ratios:
            raise ValueError(
                f"distill.importance {self.importance.kind} divides by log-probs at the rollouts' temperature, and "
                "`at: distill` reads others: use {kind: truncated}, or `at: rollouts`"
            )
        if self.over == "batch" and (self.aggregate is None or self.rows == "all"):
            raise ValueError(
                "distill.over: has no effect "
                + ("without `aggregate`" if self.aggregate is None else "where all rows are distilled (`rows: all`)")
                + ": remove it"
            )
        if sampled and self.clip is not None:
            raise ValueError("distill.clip caps entries of the vocabulary, and estimate sampled sees none: remove it")
        if sampled and self.divergence.kind == "akl":
            raise ValueError("distill.divergence akl weighs head against tail, and estimate sampled sees neither")
        if not sampled and in_ratios:
            raise ValueError(
                f"distill.importance {self.importance.kind} replaces logp in estimate sampled, and other estimates "
                "have none: use {kind: truncated}"
            )
        if isinstance(self.estimate, Sampled) and self.estimate.granularity == "sequence":
            if self.importance.kind != "none":
                raise ValueError(
                    "distill.importance weighs single tokens, and granularity sequence is one number per row: remove it"
                )
            if self.divergence.kind == "todi":
                raise ValueError("distill.divergence todi is defined per token: use `granularity: token`")
        if self.clip is not None and self.divergence.kind == "akl":
            raise ValueError("distill.clip caps terms of one divergence, and akl weighs two: remove one of them")
        if self.experts is not None:
            self._check_experts(self.experts)
        if isinstance(self.estimate, Exact) and self.divergence.kind == "akl":
            raise ValueError(
                "distill.divergence akl sorts the vocabulary, which exact reads by blocks: use estimate topk with a "
                "`k` that covers the teacher's head"
            )
        return self

    def _check_experts(self, experts: Divergence) -> None:
        if experts == self.divergence:
            raise ValueError("distill.experts: has no effect, it is the divergence of the other rows: remove it")
        if self.estimate.kind != "topk":
            raise ValueError(
                f"distill.experts: estimate {self.estimate.kind} knows one divergence; use estimate topk, which tells "
                "rows apart"
            )
        if self.rows == "routed":
            raise ValueError("distill.experts: with `rows: routed` no expert's row is distilled: set `rows: all`")
        if self.clip is not None and experts.kind == "akl":
            raise ValueError("distill.clip caps terms of one divergence, and akl weighs two: remove one of them")
