"""The output layer: from hidden states to log-probs and entropies, a block of the vocabulary at a time.

Logits of shape [K, V] exist only where they are few; otherwise a running log-sum-exp goes over blocks of the
vocabulary, and the backward pass makes each block again. So a block of the weight is converted to float32 once, and its
gradient is written once, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rollway.errors import RollwayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Most logits in memory at once: 8 MiB and 256 MiB in float32, of which a few copies exist. On the CPU a block should
stay in the cache; on a GPU it should fill the device."""


After = tuple[float, float | None]
"""Scale and soft cap of logits."""


@dataclass(frozen=True)
class Head:
    """The map from hidden states to float32 logits (float64 where the hidden states are)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: PreTrainedModel) -> Head:
        """The model's output layer, and what some architectures do to logits after it."""
        output = model.get_output_embeddings()
        settings = model.config.get_text_config().to_dict()
        # MPT has the setting, and null in it.
        scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
        return Head(output.weight, output.bias, scale, settings.get("final_logit_softcapping"))

    @staticmethod
    def between(a: Head, b: Head, rate: float) -> Head:
        """The head of the logits (1 - rate) z_a + rate z_b, for hidden states of both side by side, [K, H_a + H_b].

        Raises RollwayError where the vocabularies differ, or a soft cap makes logits that no such head has.
        """
        if len(a.weight) != len(b.weight):
            raise RollwayError(
                f"one model knows {len(a.weight)} tokens and the other {len(b.weight)}: no mean of logits"
            )
        if a.softcap is not None or b.softcap is not None:
            raise RollwayError("logits with a soft cap (final_logit_softcapping) have no mean that rollway can take")
        shares = ((1.0 - rate) * a.scale, rate * b.scale)
        weight = torch.cat([share * full_precision(h.weight) for share, h in zip(shares, (a, b), strict=True)], dim=1)
        biases = [share * full_precision(h.bias) for share, h in zip(shares, (a, b), strict=True) if h.bias is not None]
        return Head(weight, torch.stack(biases).sum(0) if biases else None, 1.0, None)

    def first(self, count: int) -> Head:
        """The head of the ids below `count` alone."""
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def logits(self, states: Tensor) -> Tensor:
        """[K, H] -> [K, V]: the product itself is taken in float32, also when weights are half precision."""
        weight, bias = full_precision(self.weight), None if self.bias is None else full_precision(self.bias)
        return _after(functional.linear(full_precision(states), weight, bias), (self.scale, self.softcap))

    def token_values(
        self, states: Tensor, targets: Tensor, temperatures: tuple[float, ...], entropy: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Log-probs [K] of `targets` [K] at each temperature, and entropies [K] at temperature 1; nats, differentiable.

        log p(y) = z_y / t - lse(z / t), d log p / d z_v = (1[v = y] - p_v) / t; H = lse(z) - sum p z,
        d H / d z_v = -p_v (log p_v + H). A second derivative is refused.
        """
        logps, spread, _ = self.values_at(states, targets, temperatures, entropy, targets.new_empty(len(targets), 0))
        return logps, spread

    def values_at(
        self,
        states: Tensor,
        targets: Tensor,
        temperatures: tuple[float, ...],
        entropy: bool,
        ids: Tensor,
        ids_temperature: float = 1.0,
    ) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """As `token_values`, and log-probs [K, J] of the tokens `ids` [K, J] at a temperature of their own.

        All in one pass over the vocabulary. An id may be there several times, and be the target's too.
        """
        logp, spread, at = _TokenValues.apply(
            states,
            self.weight,
            self.bias,
            targets,
            (self.scale, self.softcap),
            temperatures,
            entropy,
            ids,
            ids_temperature,
        )
        return list(logp.unbind(0)), spread, at


def check_head(model: PreTrainedModel, source: str) -> None:
    """Raises RollwayError when hidden states and `Head` do not give the model's own logits (a rare architecture)."""
    # Own logits are of the model's dtype: half precision differs by its rounding.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = Head.of(model).logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(was_training)
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max():
        raise RollwayError(f"{source}: {type(model).__name__} changes its logits in a way that rollway does not know")


class _TokenValues(torch.autograd.Function):
    """See `Head.values_at`. Keeps the logits when they fit in one block, else only sums [K]."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        after: After,
        temperatures: tuple[float, ...],
        entropy: bool,
        ids: Tensor,
        ids_temperature: float,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        blocks, full = blocks_of(len(states), len(weight), states.device.type), full_precision(states)
        sums = _Sums((*temperatures, *([ids_temperature] if ids.shape[1] else [])), entropy)
        wanted = torch.cat([targets[:, None], ids], dim=1)
        logits = full
        for block in blocks:
            logits = block_logits(full, weight, bias, block, after)
            sums.add(logits, wanted, block)
        ctx.after, ctx.temperatures, ctx.blocks, ctx.ids_temperature = after, temperatures, blocks, ids_temperature
        # Without this, the gradient of entropies that nobody uses would be computed as zeros.
        ctx.set_materialize_grads(False)
        kept, spread = logits if len(blocks) == 1 else None, sums.entropy()
        logs = {t: total.log() for t, total in sums.total.items()}
        of_ids = logs.get(ids_temperature) if ids.shape[1] else None
        ctx.save_for_backward(
            *(states, weight, bias, targets, ids, kept, sums.largest, spread, logs.get(1.0), of_ids),
            *(logs[t] for t in temperatures),
        )
        target, others = sums.wanted[:, 0], sums.wanted[:, 1:]
        at = others if of_ids is None else (others - sums.largest[:, None]) / ids_temperature - of_ids[:, None]
        return torch.stack([(target - sums.largest) / t - logs[t] for t in temperatures]), spread, at

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logp: Tensor | None, of_entropy: Tensor | None, of_at: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, ids, kept, largest, spread, plain, log_ids, *logs = ctx.saved_tensors
        full = full_precision(states)
        found = Slopes.of(states, weight, bias, ctx.needs_input_grad[:3])
        for block in ctx.blocks:
            logits = block_logits(full, weight, bias, block, ctx.after) if kept is None else kept
            below, slope = logits - largest[:, None], torch.zeros_like(logits)
            if of_logp is not None:
                for t, log, given in zip(ctx.temperatures, logs, of_logp, strict=True):
                    _add_logp_slope(slope, below, targets[:, None], block, t, log, given[:, None])
            if of_at is not None and log_ids is not None:
                _add_logp_slope(slope, below, ids, block, ctx.ids_temperature, log_ids, of_at)
            if of_entropy is not None:
                log_p = below.sub_(plain[:, None])
                slope.addcmul_(log_p.exp().mul_(of_entropy[:, None]), log_p.add_(spread[:, None]), value=-1.0)
            slope = before_after(slope, logits, ctx.after)
            found.add(block, slope, full, weight)
        return *found.given(states.dtype), None, None, None, None, None, None


@dataclass(frozen=True)
class Slopes:
    """Gradients of hidden states [K, H] and of the output layer, from those of its logits, a block at a time.

    None where nobody wants one.
    """

    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(states: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> Slopes:
        return Slopes(
            torch.zeros_like(full_precision(states)) if wanted[0] else None,
            torch.empty_like(weight) if wanted[1] else None,
            torch.empty_like(bias) if wanted[2] and bias is not None else None,
        )

    def add(self, block: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
        """slope [K, block], states [K, H] in full precision. Every block is added once."""
        if self.states is not None:
            self.states.addmm_(slope, full_precision(weight[block]))
        if self.weight is not None:
            self.weight[block] = slope.T @ states
        if self.bias is not None:
            self.bias[block] = slope.sum(0)

    def given(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the order of the inputs; that of the states in their own dtype."""
        return None if self.states is None else self.states.to(dtype), self.weight, self.bias


class _Sums:
    """Running sums [K] over the vocabulary, relative to the largest logit so far (online softmax, arXiv 1805.02867)."""

    largest: Tensor
    wanted: Tensor
    """[K, J] logits of the wanted tokens."""
    spread: Tensor

    def __init__(self, temperatures: tuple[float, ...], entropy: bool) -> None:
        self.temperatures, self.wants_entropy = sorted({*temperatures, *([1.0] if entropy else [])}), entropy
        self.total: dict[float, Tensor] = {}
        """sum exp((z - m) / t)"""

    def add(self, logits: Tensor, wanted: Tensor, block: slice) -> None:
        first, largest = block.start == 0, logits.amax(dim=1)
        if first:
            self.wanted, self.spread = logits.new_zeros(wanted.shape), torch.zeros_like(largest)
        else:
            largest = torch.maximum(self.largest, largest)
            shift = self.largest - largest
            if self.wants_entropy:
                # spread = sum exp(z - m) (z - m), which moves with m.
                self.spread = shift.exp() * (self.spread + shift * self.total[1.0])
            self.total = {t: total * (shift / t).exp() for t, total in self.total.items()}
        self.largest = largest
        rows, columns, inside = _places(wanted, block)
        self.wanted[rows, columns] = logits[rows, inside]
        below = logits - largest[:, None]
        for t in self.temperatures:
            share = below.exp() if t == 1.0 else (below / t).exp_()
            self.total[t] = share.sum(dim=1) if first else self.total[t] + share.sum(dim=1)
            if t == 1.0 and self.wants_entropy:
                self.spread = self.spread + share.mul_(below).sum(dim=1)

    def entropy(self) -> Tensor | None:
        return self.total[1.0].log() - self.spread / self.total[1.0] if self.wants_entropy else None


def _add_logp_slope(
    slope: Tensor, below: Tensor, wanted: Tensor, block: slice, t: float, log: Tensor, given: Tensor
) -> None:
    """Adds sum_j given_j (1[v = y_j] - p_v) / t to `slope` [K, block]; p = exp(below / t - log), given [K, J]."""
    share = (below if t == 1.0 else below / t).sub(log[:, None]).exp_()
    slope.sub_(share.mul_(given.sum(1, keepdim=True) / t))
    rows, columns, inside = _places(wanted, block)
    slope.index_put_((rows, inside), given[rows, columns] / t, accumulate=True)


def _places(wanted: Tensor, block: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the wanted tokens [K, J] that lie in the block, and where in it."""
    rows, columns = ((wanted >= block.start) & (wanted < block.stop)).nonzero(as_tuple=True)
    return rows, columns, wanted[rows, columns] - block.start


def blocks_of(tokens: int, vocabulary: int, device: str) -> list[slice]:
    """Of the vocabulary, such that the logits of one of them for all tokens are few."""
    width = max(1, LOGIT_ELEMENTS.get(device, LOGIT_ELEMENTS["cuda"]) // max(1, tokens))
    return [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]


def block_logits(states: Tensor, weight: Tensor, bias: Tensor | None, block: slice, after: After) -> Tensor:
    """[K, block] of hidden states [K, H] in full precision."""
    return _after(
        functional.linear(states, full_precision(weight[block]), None if bias is None else full_precision(bias[block])),
        after,
    )


def _after(product: Tensor, after: After) -> Tensor:
    """What some architectures do to logits: scale them, bend them below a cap."""
    scale, softcap = after
    if scale != 1.0:
        product = product * scale
    return product if softcap is None else torch.tanh(product / softcap) * softcap


def before_after(slope: Tensor, logits: Tensor, after: After) -> Tensor:
    """From slopes of logits to those of the product that `_after` took."""
    scale, softcap = after
    if softcap is not None:
        slope = slope * (1.0 - (logits / softcap).square())
    return slope if scale == 1.0 else slope * scale


def full_precision(x: Tensor) -> Tensor:
    """As float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()
