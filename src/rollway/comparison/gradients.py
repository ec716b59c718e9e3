"""The gradients of several recipes on the same stored rollouts: norms, angles, and which tokens carry them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollway.comparison import stored as files
from rollway.comparison.stored import StoredRound
from rollway.config.experiment import Experiment, Fork
from rollway.config.recipes import parse
from rollway.config.training import TrainConfig
from rollway.errors import RollwayError
from rollway.objectives import initial_state, loss, prepare, requirements
from rollway.objectives.needs import advantage_needed
from rollway.policies import causal_lm, critic, manifest
from rollway.policies.critic import Critic
from rollway.policies.logprobs import token_logprobs
from rollway.training.batch import TrainingBatch, training_batch
from rollway.training.gradients import Models, accumulate
from rollway.training.optimizer import learning_rate
from rollway.training.precompute import Round, precompute
from rollway.training.state import TrainState, load_state


@dataclass(frozen=True)
class Measured:
    """One recipe's gradient on its batch: one vector over all trainable parameters, and what it is made of."""

    gradient: list[Tensor]
    """Of each trainable parameter, on the CPU."""
    loss: float
    rows: int
    """Rows of the recipe's batch."""
    rows_used: int
    """Rows with a token whose log-prob has a gradient."""
    tokens: int
    """Tokens that may be trained on."""
    tokens_used: int
    """Tokens whose log-prob has a gradient other than exactly 0."""
    gated: float | None
    """Share of tokens with advantage and weight other than 0 whose gradient is exactly 0; None without advantages."""
    effective_tokens: float
    """(sum |c|)^2 / sum c^2 of c = d loss / d log-prob: as many equal tokens would carry the gradient (Kish 1965)."""
    ess: float | None
    """(sum w)^2 / (n sum w^2) of w = exp(log-prob - behaviour's) over tokens; None where no behaviour is known."""

    @property
    def norm(self) -> float:
        """Euclidean, before any clipping."""
        return math.sqrt(dot(self.gradient, self.gradient))


@dataclass(frozen=True)
class GradientComparison:
    """Recipes in the order asked for; those that cannot be computed have a sentence instead."""

    run: str
    round: int
    at: str
    measured: dict[str, Measured]
    cosine: dict[tuple[str, str], float | None]
    """None where a gradient is exactly 0."""
    reasons: dict[str, str]


def compare_gradients(
    results: Path, run: str, round: int, recipes: Sequence[str], *, experiment: Experiment | None = None, at: str
) -> GradientComparison:
    """Each recipe's gradient on the rollouts of one round of `run`.

    Old log-probs, advantages and selections are those of the round's policy. at: `same` evaluates the gradient there
    (the first update: ratios are 1), `next` at the policy one round on (the ratios of the run's own drift). The whole
    batch counts as one optimiser batch. Raises RollwayError when the round or a policy is not there, a recipe is
    unknown, or none can be computed; what a recipe alone lacks becomes its reason.
    """
    stored = files.open_round(results, run, round)
    names = list(dict.fromkeys(recipes))
    files.check_names(stored, names, experiment)
    origin = causal_lm.load(stored.policy(round), "main", train=True).model
    place = origin if at == "same" else causal_lm.load(stored.policy(round + 1), "main", train=True).model
    for model in {id(m): m for m in (origin, place)}.values():
        model.eval()
    work = _Work(stored, experiment, origin, place)
    measured: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            measured[name] = work.measure(name)
        except RollwayError as error:
            reasons[name] = str(error)
    if not measured:
        left_out = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RollwayError(f"compare-gradients: no recipe can be computed on round {round} of {run}: {left_out}")
    return GradientComparison(run, round, at, measured, cosines(measured), reasons)


def fix(
    origin: PreTrainedModel,
    values: Critic | None,
    reference: PreTrainedModel | None,
    batch: TrainingBatch,
    train: TrainConfig,
    state: TrainState,
    temperature: float,
) -> tuple[Round, dict[str, Tensor]]:
    """What the trainer holds fixed during the round's updates, and the objective's memory at its first one."""
    objective = train.objective
    memory = {name: state.objective.get(name, start) for name, start in initial_state(objective).items()}
    fixed = precompute(origin, values, reference, batch, train, memory, temperature)
    done = min(1.0, state.updates / train.objective_horizon) if train.objective_horizon else 0.0
    tokens = prepare(fixed.tokens, objective, state=memory, progress=done)
    return replace(fixed, tokens=replace(tokens, lr=learning_rate(train.optimizer, state.updates))), memory


def measure(
    place: PreTrainedModel,
    values: Critic | None,
    fixed: Round,
    memory: dict[str, Tensor],
    train: TrainConfig,
    temperature: float,
) -> Measured:
    """The trainer's gradient of the objective at `place`, all rows as one optimiser batch; clears `.grad` after."""
    place.zero_grad(set_to_none=True)
    models = Models(place, values, temperature, train.micro_tokens)
    got = accumulate(models, fixed.rows, fixed.tokens, train.objective, memory)
    gradient = [
        torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.detach().cpu().clone()
        for p in place.parameters()
        if p.requires_grad
    ]
    place.zero_grad(set_to_none=True)
    if values is not None:
        values.zero_grad(set_to_none=True)
    slopes = token_slopes(place, fixed, memory, train, temperature)
    mask = fixed.tokens.mask if fixed.tokens.weight is None else fixed.tokens.mask & (fixed.tokens.weight != 0)[:, None]
    moving = mask & (slopes != 0)
    size = slopes[mask].double().abs()
    squares = float(size.square().sum())
    return Measured(
        gradient=gradient,
        loss=got.metrics["loss"],
        rows=len(fixed.rows),
        rows_used=int(moving.any(1).sum()),
        tokens=int(mask.sum()),
        tokens_used=int(moving.sum()),
        gated=_gated_share(fixed, mask, moving) if advantage_needed(train.objective) else None,
        effective_tokens=float(size.sum()) ** 2 / squares if squares > 0 else 0.0,
        ess=_importance_ess(got.logp, fixed, mask),
    )


def token_slopes(
    place: PreTrainedModel, fixed: Round, memory: dict[str, Tensor], train: TrainConfig, temperature: float
) -> Tensor:
    """[N, T] d loss / d log-prob of each token at `place`; an entropy bonus reaches the policy by another way."""
    objective = train.objective
    hidden = "hidden" in requirements(objective)
    seen = token_logprobs(
        place, fixed.rows, temperature=temperature, micro_tokens=train.micro_tokens, entropy=True, hidden=hidden
    )
    leaf = seen.logp.requires_grad_()
    batch = replace(fixed.tokens, logp=leaf, entropy=seen.entropy, hidden=seen.hidden)
    if hidden:
        batch = replace(batch, lm_head=place.get_output_embeddings().weight.detach())
    value = loss(batch, objective, state=memory).loss
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (slopes,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if slopes is None else slopes


def cosines(measured: dict[str, Measured]) -> dict[tuple[str, str], float | None]:
    """Of every pair of gradients, both ways; 1 with itself by definition."""
    norms = {name: m.norm for name, m in measured.items()}
    found: dict[tuple[str, str], float | None] = {}
    names = list(measured)
    for i, a in enumerate(names):
        for b in names[i:]:
            product = norms[a] * norms[b]
            cosine = dot(measured[a].gradient, measured[b].gradient) / product if product > 0 else None
            found[a, b] = found[b, a] = None if cosine is None else max(-1.0, min(1.0, cosine))
    return found


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product in float64, a parameter at a time."""
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def rows(comparison: GradientComparison) -> pa.Table:
    """One row per ordered pair of recipes, with the figures of the first; one row with a reason for each left out."""
    shared = {"run": comparison.run, "round": comparison.round, "at": comparison.at}
    found = []
    for (name, other), cosine in sorted(comparison.cosine.items()):
        m = comparison.measured[name]
        figures = {field: getattr(m, field) for field in (*_WHOLE, *_SHARES)}
        found.append({**shared, "recipe": name, "other": other, "cosine": cosine, **figures})
    found += [{**shared, "recipe": name, "reason": reason} for name, reason in sorted(comparison.reasons.items())]
    return pa.Table.from_pylist(found, schema=_SCHEMA)


_WHOLE = ("rows", "rows_used", "tokens", "tokens_used")
_SHARES = ("norm", "loss", "gated", "effective_tokens", "ess")
_SCHEMA = pa.schema(
    [
        *(("run", pa.string()), ("round", pa.int32()), ("at", pa.string())),
        *(("recipe", pa.string()), ("other", pa.string()), ("cosine", pa.float64())),
        *((name, pa.int64()) for name in _WHOLE),
        *((name, pa.float64()) for name in _SHARES),
        ("reason", pa.string()),
    ]
)


@dataclass
class _Work:
    """What the recipes share: the round, its policies, and the reference and critic once one of them asks."""

    stored: StoredRound
    experiment: Experiment | None
    origin: PreTrainedModel
    place: PreTrainedModel
    reference: PreTrainedModel | None = None

    def measure(self, name: str) -> Measured:
        stored = self.stored
        recipe = files.recipe_for(stored, name, self.experiment)
        train = recipe.train
        made, rollouts = files.curated(stored, recipe)
        batch = made.batch
        if not batch.num_rows:
            raise RollwayError(f"its SQL keeps no row of round {stored.round}")
        values = self._critic() if train.critic is not None else None
        temperature = self._temperature()
        chosen = training_batch(batch, rollouts)
        state = self._state(name)
        fixed, memory = fix(self.origin, values, self._reference(train), chosen, train, state, temperature)
        return measure(self.place, values, fixed, memory, train, temperature)

    def _temperature(self) -> float:
        """Of the stored rollouts, whatever another config would sample at."""
        return float(self.stored.rollout_settings().get("sampling", {}).get("temperature", 1.0))

    def _critic(self) -> Critic:
        path = self.stored.policy(self.stored.round)
        if "critic" not in manifest.read_manifest(path).policies:
            raise RollwayError(f"needs a critic, and {path} holds none: compare on rollouts of a run that trains one")
        return critic.load_critic(path)

    def _reference(self, train: TrainConfig) -> PreTrainedModel | None:
        if not train.needs_reference():
            return None
        if self.reference is None:
            self.reference = causal_lm.load(self.stored.policy(0), "main").model
        return self.reference

    def _state(self, name: str) -> TrainState:
        """Counters of the round; dual variables and moments only for the recipe whose they are."""
        state = state_before(self.stored)
        return state if files.own_recipe(self.stored, name, self.experiment) else replace(state, objective={})


def state_before(stored: StoredRound) -> TrainState:
    """What the trainer starts from in the round: a fork may leave what its parent carried behind."""
    path = stored.policy(stored.round)
    fork = stored.info["config"].get("fork")
    anew = fork is not None and parse(Fork, fork, "config.fork").begins_anew(stored.round)
    if anew or not manifest.read_manifest(path).state:
        return TrainState(seed=int(stored.info["seed"]))
    return load_state(path.parent / "state")


def _gated_share(fixed: Round, mask: Tensor, moving: Tensor) -> float | None:
    advantage = fixed.tokens.advantage
    assert advantage is not None
    spread = advantage if advantage.dim() == 2 else advantage[:, None].expand_as(mask)
    pushed = mask & (spread != 0)
    return float((pushed & ~moving).sum() / pushed.sum()) if bool(pushed.any()) else None


def _importance_ess(logp: Tensor, fixed: Round, mask: Tensor) -> float | None:
    known = mask & fixed.behaviour.isfinite()
    weight = (logp - fixed.behaviour)[known].double().clamp(-20, 20).exp()
    return float(weight.sum().square() / (weight.numel() * weight.square().sum())) if weight.numel() else None
