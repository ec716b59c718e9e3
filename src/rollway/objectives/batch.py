"""What an objective sees of a batch: per-token tensors of N rows and T padded tokens."""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rollway.errors import RollwayError

_PAIRS = ("pair_chosen", "pair_rejected")
_WHOLE = ("lm_head", "lr")


@dataclass(frozen=True)
class TokenBatch:
    """N completions, padded to T tokens. What is absent is None. Log-probs in nats.

    Values at masked positions are never read, so they may be anything, NaN included.
    """

    logp: Tensor
    """[N, T] current policy; the gradient goes here."""
    mask: Tensor
    """[N, T] bool: tokens the policy wrote and is trained on; false on prompt, padding and tool output."""
    advantage: Tensor | None = None
    """[N] or [N, T], a constant."""
    logp_old: Tensor | None = None
    """[N, T] trainer's policy at the start of the update."""
    logp_ref: Tensor | None = None
    """[N, T] reference policy."""
    logp_behavior: Tensor | None = None
    """[N, T] the engine that sampled, at the sampling temperature."""
    logp_old_temp: Tensor | None = None
    """[N, T] old policy with logits / T, T from `dcpo_temperature`."""
    entropy: Tensor | None = None
    """[N, T] of the current policy over the whole vocabulary, nats, temperature 1."""
    value: Tensor | None = None
    """[N, T] critic."""
    value_old: Tensor | None = None
    """[N, T] critic at the start of the update."""
    returns: Tensor | None = None
    """[N, T] value targets."""
    weight: Tensor | None = None
    """[N] row weights; None: 1."""
    group: Tensor | None = None
    """[N] int64: rows of one prompt group share a number."""
    reward: Tensor | None = None
    """[N]"""
    correct: Tensor | None = None
    """[N] bool or 0/1."""
    route: Tensor | None = None
    """[N] int64: index into `rollway.config.objectives.ROUTES`; None: all `policy`."""
    domain: Tensor | None = None
    """[N] int64"""
    age: Tensor | None = None
    """[N] int64: rounds since the row was sampled."""
    pair_chosen: Tensor | None = None
    """[P] int64 row numbers."""
    pair_rejected: Tensor | None = None
    """[P] int64 row numbers."""
    token_ids: Tensor | None = None
    """[N, T] int64 sampled tokens."""
    logits: Tensor | None = None
    """[N, T, V], for small vocabularies and tests."""
    teacher_logits: Tensor | None = None
    """[N, T, V]"""
    topk_ids: Tensor | None = None
    """[N, T, K] int64"""
    topk_logp: Tensor | None = None
    """[N, T, K] current policy at `distill.temperature`; the gradient goes here too."""
    teacher_topk_logp: Tensor | None = None
    """[N, T, K] teacher at `distill.temperature`."""
    teacher_tail: Tensor | None = None
    """[N, T] teacher's probability outside the top K, of callers that know it; None: what the K leave of 1."""
    teacher_entropy: Tensor | None = None
    """[N, T]"""
    teacher_logp: Tensor | None = None
    """[N, T] teacher's log-prob of the sampled token."""
    divergence: Tensor | None = None
    """[N, T] exact divergence of the current policy from the teacher, as `objective.distill` names it; the gradient
    goes here too."""
    raw_divergence: Tensor | None = None
    """[N, T] the same without `distill.clip`, a constant."""
    clipped_entries: Tensor | None = None
    """[N, T] share of the vocabulary's entries that the clip acts on, a constant."""
    hit: Tensor | None = None
    """[N, T] share of the candidates of gate `one_token` that are the row's own token, a constant."""
    missed: Tensor | None = None
    """[N, T] mean over all candidates of the log-prob of those that are not; the gradient goes here too."""
    hidden: Tensor | None = None
    """[N, T, H] last hidden state that predicts each token."""
    lm_head: Tensor | None = None
    """[V, H]"""
    lr: Tensor | float | None = None
    """Learning rate of the coming step."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors [N, ...] of one method, or scalars."""

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.logp)

    def rows(self, index: Tensor | list[int] | slice, *, split_pairs: bool = False) -> "TokenBatch":
        """The rows at `index` (integers, or a bool mask [N]); pairs are renumbered.

        Raises RollwayError when a pair would lose one of its rows; `split_pairs=True` drops such pairs instead.
        """
        at = torch.arange(self.n_rows, device=self.logp.device)[index]
        changed: dict[str, object] = {}
        for f in fields(self):
            x = getattr(self, f.name)
            if f.name == "extra":
                changed[f.name] = {k: v[at] if v.dim() > 0 else v for k, v in self.extra.items()}
            elif x is not None and f.name not in (*_PAIRS, *_WHOLE):
                changed[f.name] = x[at]
        if self.pair_chosen is not None and self.pair_rejected is not None:
            chosen, rejected = (
                _renumber(self.pair_chosen, at, self.n_rows),
                _renumber(self.pair_rejected, at, self.n_rows),
            )
            whole = (chosen >= 0) & (rejected >= 0)
            if not split_pairs and bool(((chosen >= 0) != (rejected >= 0)).any()):
                raise RollwayError("rows(): a preference pair would be split; choose rows so that pairs stay together")
            changed |= {"pair_chosen": chosen[whole], "pair_rejected": rejected[whole]}
        return replace(self, **changed)  # type: ignore[arg-type]

    def cleaned(self) -> "TokenBatch":
        """The same batch with 0 at masked positions of [N, T, ...] fields, and as advantage of rows without tokens."""
        changed: dict[str, object] = {}
        for f in fields(self):
            x = getattr(self, f.name)
            if f.name in ("mask", "extra", *_PAIRS, *_WHOLE) or x is None:
                continue
            if x.dim() >= 2 and f.name not in ("token_ids", "topk_ids"):
                keep = self.mask.view(*self.mask.shape, *([1] * (x.dim() - 2)))
                changed[f.name] = torch.where(keep, full_precision(x), 0.0)
            elif f.name == "advantage":
                changed[f.name] = torch.where(self.mask.any(1), full_precision(x), 0.0)
        return replace(self, **changed)  # type: ignore[arg-type]


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def route_codes(names: list[str | None]) -> Tensor:
    """Route names of curated rows as the codes [N] of `TokenBatch.route`. Raises RollwayError on an unknown name."""
    from rollway.config.objectives import ROUTES

    for name in names:
        if name is not None and name not in ROUTES:
            raise RollwayError(
                f"route {name!r} is unknown to the objectives; the SQL of curate.route may give {', '.join(ROUTES)}"
            )
    return torch.tensor([0 if name is None else ROUTES.index(name) for name in names], dtype=torch.int64)


def _renumber(rows: Tensor, at: Tensor, n_rows: int) -> Tensor:
    where = torch.full((n_rows,), -1, dtype=torch.int64, device=rows.device)
    where[at] = torch.arange(len(at), device=rows.device)
    return where[rows]
