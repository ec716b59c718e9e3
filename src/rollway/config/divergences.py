"""How far a teacher's next-token distribution P is from the policy's Q: the kinds of divergence and their parameters.

With u = P / Q every kind but the adaptive ones is D = sum_v Q f(u), f convex, f(1) = 0 (arXiv 2604.00626, eq. 2).
Formulas stand beside the functions in `rollway.objectives.divergences`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rollway.config.base import Strict
from rollway.config.objective_parts import expand


class ForwardKl(Strict):
    """KL(P || Q), the teacher first: covers all that the teacher does. Infinite where Q = 0 < P."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKl(Strict):
    """KL(Q || P), the policy first: seeks one of the teacher's modes. Infinite where P = 0 < Q."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class Jeffreys(Strict):
    """KL(P || Q) + KL(Q || P). Infinite where either is."""

    kind: Literal["jeffreys"] = "jeffreys"


class Jsd(Strict):
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649); at most ln 2."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0.0, le=1.0)
    """Weight of the teacher in M. 0 is the forward KL and 1 the reverse KL, by convention: the limits of JSD / beta and
    JSD / (1 - beta), not of JSD, which falls to 0."""


class SkewForward(Strict):
    """KL(P || alpha P + (1 - alpha) Q) (DistiLLM, arXiv 2402.03898); at most ln(1 / alpha)."""

    kind: Literal["skew_forward"] = "skew_forward"
    alpha: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the teacher mixed into the policy. 0 would be the forward KL."""


class SkewReverse(Strict):
    """KL(Q || (1 - alpha) P + alpha Q) (DistiLLM, arXiv 2402.03898); at most ln(1 / alpha)."""

    kind: Literal["skew_reverse"] = "skew_reverse"
    alpha: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the policy mixed into the teacher. 0 would be the reverse KL."""


class Amari(Strict):
    """(sum P^alpha Q^(1 - alpha) - 1) / (alpha (alpha - 1)); finite on disjoint supports where 0 < alpha < 1."""

    kind: Literal["amari"] = "amari"
    alpha: float = Field(0.5, allow_inf_nan=False)
    """1: the forward KL, 0: the reverse KL (limits), 1/2: twice the squared Hellinger distance, 2: half of chi2."""


class TotalVariation(Strict):
    """sum |P - Q| / 2; at most 1."""

    kind: Literal["total_variation"] = "total_variation"


class PearsonChi2(Strict):
    """sum (P - Q)^2 / Q. Infinite where Q = 0 < P."""

    kind: Literal["pearson_chi2"] = "pearson_chi2"


class NeymanChi2(Strict):
    """sum (P - Q)^2 / P, Pearson's with the arguments swapped. Infinite where P = 0 < Q."""

    kind: Literal["neyman_chi2"] = "neyman_chi2"


class Hellinger2(Strict):
    """sum (sqrt P - sqrt Q)^2; at most 2."""

    kind: Literal["hellinger2"] = "hellinger2"


class ToDi(Strict):
    """sum a P ln(P / Q) + (1 - a) Q ln(Q / P), a = P / (P + Q) a constant (ToDi; reconstructed)."""

    kind: Literal["todi"] = "todi"


class Akl(Strict):
    """Forward and reverse KL, weighed by |P - Q| on the teacher's head and on its tail (AKL; reconstructed)."""

    kind: Literal["akl"] = "akl"
    head: float = Field(0.5, gt=0.0, lt=1.0)
    """Mass of the head: the shortest prefix, by falling P, that reaches it."""


AnyDivergence = Annotated[
    ForwardKl
    | ReverseKl
    | Jeffreys
    | Jsd
    | SkewForward
    | SkewReverse
    | Amari
    | TotalVariation
    | PearsonChi2
    | NeymanChi2
    | Hellinger2
    | ToDi
    | Akl,
    Field(discriminator="kind"),
]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jsd",
    "skew_forward",
    "skew_reverse",
    "amari",
    "total_variation",
    "pearson_chi2",
    "neyman_chi2",
    "hellinger2",
    "todi",
    "akl",
]
Divergence = Annotated[AnyDivergence, BeforeValidator(expand, json_schema_input_type=DivergenceName | AnyDivergence)]
