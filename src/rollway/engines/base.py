"""What every rollout engine takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from rollway.config.rollouts import Sampling

if TYPE_CHECKING:
    from rollway.policies.causal_lm import CausalPolicy


@dataclass(frozen=True)
class Request:
    """One completion to be drawn. Requests that share a prompt hold the same tokens."""

    rollout_id: str
    prompt_tokens: Sequence[int]


@dataclass(frozen=True)
class TeacherShare:
    """A model with a share in what is drawn: each token comes from share x its distribution + (1 - share) x the
    policy's, both at the sampling temperature."""

    policy: CausalPolicy
    share: float


@dataclass(frozen=True)
class Completion:
    """What was sampled, the stop token included."""

    tokens: list[int]
    logprobs: list[float]
    """Nats, of the distribution that was sampled (temperature and truncation applied)."""
    finish: Literal["stop", "length"]
    """stop: a stop token or text was written. length: the token limit or the model's context ended it."""
    entropy: list[float] | None = None
    """Nats, full vocabulary at temperature 1."""


class Draw(Protocol):
    """Draws one completion per request from one policy, in the order of the requests."""

    def __call__(
        self, requests: Sequence[Request], sampling: Sampling, *, seed: int, entropy: bool = False
    ) -> list[Completion]: ...


class Generate(Protocol):
    """Draws one completion per request, in the order of the requests."""

    def __call__(
        self,
        policy: CausalPolicy,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        entropy: bool = False,
        teacher: TeacherShare | None = None,
    ) -> list[Completion]: ...
