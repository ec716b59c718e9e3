"""Every recipe inherits these properties, from its SQL to its gradient: the field's bugs, tried on each method.

tests/objectives/test_properties.py tries most of them on every objective; here the batch is the one that the recipe's
own SQL makes, with its advantages, weights, routes and pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from incidents.recipes import (
    EOS,
    PAD,
    Synthetic,
    curated,
    default_batch,
    gradients,
    leaves,
    make_batch,
    pull,
    recipe_of,
    scored_rows,
)
from rollway.config import recipe_names
from rollway.config.objectives import (
    ROUTES,
    GroupMeanTokenSum,
    KlPenalty,
    NoGate,
    Objective,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqSumConst,
    TokenMean,
    TokenRatio,
)
from rollway.objectives import TokenBatch, initial_state, loss, prepare, separable, totals, unit
from rollway.objectives.imitation import imitated_rows, imitation_weight
from rollway.policies.critic import Critic
from rollway.policies.logprobs import token_logprobs
from rollway.policies.manifest import NamedPolicy
from rollway.training.gradients import Models, accumulate
from rollway.training.packing import units
from training.tiny import gradients as parameter_gradients
from training.tiny import largest_difference, tiny

NAMES = recipe_names()
PREFERENCE = [n for n in NAMES if recipe_of(n).train.objective.preference.kind != "none"]
POLICY = [n for n in NAMES if n not in PREFERENCE]


def evaluated(batch: TokenBatch, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    value = loss(batch, objective).loss
    return value.detach(), gradients(value, batch)


def prepared(made: Synthetic) -> TokenBatch:
    """What the objective settles over the whole batch (selected tokens, mixed advantages) settled."""
    progress = float(made.tokens.extra["progress"]) if "progress" in made.tokens.extra else 0.0
    return prepare(made.tokens, made.objective, progress=progress)


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-12) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


DISTILL = ROUTES.index("distill")

# The finite difference moves what a stop-gradient holds still. These are the moves that leave it where it is.
HELD = {
    "cispo": "old log-probs move along, so that the clipped ratio, a constant, stays",
    "gspo-token": "the ratio's value is a constant; with one advantage per row its gradient is GSPO's (eq. 14)",
    "dagrpo": "the anchors' ratio pi / sg(pi) is 1 whatever pi: expert rows stay, and are tested in closed form",
    "opd": "the teacher's log-probs move along, so that the log-ratio, a constant, stays",
    "dft": "the probability is a constant weight, so that the gradient is that of -pi: a ratio to an old log-prob of 0",
    "scope": "the teacher's log-probs move along, so that the log-ratio, a constant, stays",
    **dict.fromkeys(
        ("sdpo", "srpo"), "of distilled rows old and engine's log-probs move along: their ratio's weight is a constant"
    ),
}
WEIGHTS_HELD = {
    "todi": "objectives/test_opd_survey.py::test_adaptive_kinds_by_finite_differences_with_their_weights_held",
    "akl": "objectives/test_opd_survey.py::test_adaptive_kinds_by_finite_differences_with_their_weights_held",
}
"""Divergences with weights that are constants made of what is differenced, and where these are held."""


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name: str) -> None:
    """In float64, along random directions; INCIDENTS 2, 6, 7."""
    if name in WEIGHTS_HELD:
        pytest.skip(WEIGHTS_HELD[name])
    made = default_batch(name)
    objective, batch = made.objective, prepared(made)
    wanted = gradients(loss(batch, objective).loss, batch)
    differenced = recipe_of("gspo").train.objective if name == "gspo-token" else objective
    if name == "dft":
        differenced = recipe_of("rft").train.objective.model_copy(update={"ratio": TokenRatio(), "gate": NoGate()})
        batch = replace(batch, logp_old=torch.zeros_like(batch.logp), advantage=torch.ones_like(batch.weight))
    g, step = torch.Generator().manual_seed(1), 1e-6
    for _ in range(4):
        way = {n: torch.randn(x.shape, dtype=x.dtype, generator=g) for n, x in leaves(batch).items()}
        if name == "dagrpo":
            way["logp"][batch.route == 1] = 0.0
        values = []
        for sign in (1.0, -1.0):
            moved = {n: x.detach() + sign * step * way[n] for n, x in leaves(batch).items()}
            if name == "cispo":
                moved["logp_old"] = batch.logp_old + sign * step * way["logp"]
            if name in ("sdpo", "srpo"):
                still = way["logp"] if batch.route is None else way["logp"] * (batch.route == DISTILL)[:, None]
                for field in ("logp_old", "logp_behavior"):
                    moved[field] = getattr(batch, field) + sign * step * still
            if name in ("opd", "scope"):
                moved["teacher_logp"] = batch.teacher_logp + sign * step * way["logp"]
            values.append(loss(replace(batch, **moved), differenced).loss)
        found = (values[0] - values[1]) / (2 * step)
        slope = sum((wanted[n] * way[n])[batch.mask].sum() for n in way)
        torch.testing.assert_close(found, slope, atol=1e-8, rtol=1e-6)


def cuts(made: Synthetic, batch: TokenBatch, parts: str) -> list[list[int]]:
    """Rows of each micro-batch: all, halves, one by one, or ragged; pairs stay together."""
    whole = units(None, made.pairs, batch.n_rows)
    n = len(whole)
    match parts:
        case "1 x all":
            sizes = [n]
        case "2 x half":
            sizes = [n // 2, n - n // 2]
        case "all x 1":
            sizes = [1] * n
        case _:
            sizes = [1, n // 3, n - 1 - n // 3]
    ends = np.cumsum([0, *sizes]).tolist()
    return [[r for u in whole[a:b] for r in u] for a, b in pairwise(ends) if b > a]


@pytest.mark.parametrize("parts", ["1 x all", "2 x half", "all x 1", "ragged"])
@pytest.mark.parametrize("name", [n for n in NAMES if unit(recipe_of(n).train.objective) != "batch"])
def test_micro_batches_add_up(name: str, parts: str) -> None:
    """INCIDENTS 1, 3, 5: with the totals of the optimiser batch, any cut has the gradient of the whole."""
    made = default_batch(name)
    objective, batch = made.objective, prepared(made)
    state, whole = initial_state(objective), totals(batch, objective)
    expected, slopes = evaluated(batch, objective)
    value = sum(loss(batch.rows(at), objective, state=state, totals=whole).loss for at in cuts(made, batch, parts))
    assert isinstance(value, Tensor)
    torch.testing.assert_close(value.detach(), expected, atol=1e-12, rtol=0)
    close(gradients(value, batch), slopes)


@pytest.mark.parametrize("name", [n for n in NAMES if unit(recipe_of(n).train.objective) != "batch"])
def test_ranks_with_unequal_token_counts_add_up(name: str) -> None:
    """INCIDENT 4: ranks share nothing but the totals; the parameters' gradients are summed, not averaged."""
    made = default_batch(name)
    objective, batch = made.objective, prepared(made)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def slope(part: TokenBatch, given: dict[str, Tensor] | None) -> Tensor:
        moved = {"logp": part.logp * weights[0] + weights[1]}
        if part.topk_logp is not None:
            moved["topk_logp"] = part.topk_logp * weights[0] + weights[1]
        if part.divergence is not None:
            moved["divergence"] = part.divergence * weights[0] + weights[1]
        return torch.autograd.grad(loss(replace(part, **moved), objective, totals=given).loss, weights)[0]

    whole = totals(batch, objective)
    single = slope(batch, None)
    assert bool(single.any())
    together = units(None, made.pairs, batch.n_rows)
    for ranks in (2, 3):
        rows = [[r for u in together[k::ranks] for r in u] for k in range(ranks)]
        torch.testing.assert_close(sum(slope(batch.rows(r), whole) for r in rows if r), single, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if unit(recipe_of(n).train.objective) == "batch"])
def test_ranks_of_interacting_rows_add_up(name: str) -> None:
    """INCIDENT 4: where rows interact, log-probs are gathered, and each rank backpropagates its rows' slopes."""
    made = default_batch(name)
    objective, batch = made.objective, prepared(made)
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    moved = batch.logp.detach() * weights[0] + weights[1]
    single = torch.autograd.grad(loss(replace(batch, logp=moved), objective).loss, weights)[0]
    gathered = replace(batch, logp=moved.detach().requires_grad_())
    slopes = torch.autograd.grad(loss(gathered, objective).loss, gathered.logp)[0]
    found = torch.zeros_like(single)
    for rank in range(3):
        own = torch.arange(rank, batch.n_rows, 3)
        mine = batch.logp.detach()[own].nan_to_num() * weights[0] + weights[1]
        found += torch.autograd.grad(mine, weights, grad_outputs=slopes[own])[0]
    torch.testing.assert_close(found, single, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if not separable(recipe_of(n).train.objective)] + ["capo", "ppo"])
def test_the_trainer_gives_the_gradient_of_the_whole_batch(name: str) -> None:
    """INCIDENT 1 through a model: rows that interact or come in pairs, hidden states, a critic; any micro-batches.

    tests/training/test_recipes.py takes every recipe through its updates with two sizes of micro-batches.
    """
    made = default_batch(name)
    objective, rows = made.objective, made.rows.rows
    policy = tiny()
    critic = Critic(tiny(seed=2, dtype=torch.float32), NamedPolicy(kind="critic")) if objective.value else None
    trained: list[torch.nn.Module] = [policy] if critic is None else [policy, critic]
    width = max(len(r.tokens) for r in rows)
    tokens = replace(_narrow(made.tokens, width), hidden=None, lm_head=None, lr=1e-3)
    seen = token_logprobs(
        policy, rows, temperature=1.0, micro_tokens=10**6, entropy=True, hidden=name == "capo", grad=True
    )
    filled = replace(tokens, logp=seen.logp, entropy=seen.entropy)
    if critic is not None:
        filled = replace(filled, value=critic(rows, width).double())
    if name == "capo":
        head = policy.get_output_embeddings().weight.detach()
        filled = replace(filled, hidden=seen.hidden.detach(), lm_head=head)
    for model in trained:
        model.zero_grad(set_to_none=True)
    loss(filled, objective).loss.backward()
    expected = [g for model in trained for g in parameter_gradients(model)]
    assert max(float(g.abs().max()) for g in expected) > 1e-6
    for micro in (1, 25, 1000):
        for model in trained:
            model.zero_grad(set_to_none=True)
        accumulate(Models(policy, critic, 1.0, micro), rows, tokens, objective, initial_state(objective))
        found = [g for model in trained for g in parameter_gradients(model)]
        assert largest_difference(found, expected) < (1e-10 if critic is None else 1e-6)


def _narrow(batch: TokenBatch, width: int) -> TokenBatch:
    cut = {
        name: x[:, :width].detach()
        for name, x in vars(batch).items()
        if isinstance(x, Tensor) and x.dim() >= 2 and name not in ("lm_head", "advantage")
    }
    advantage = batch.advantage
    if advantage is not None and advantage.dim() == 2:
        cut["advantage"] = advantage[:, :width]
    return replace(batch, **cut)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_scored_rows_does_not_matter(name: str) -> None:
    """INCIDENT 14: the table is the same, byte for byte, in whatever order rollouts and their scores come."""
    rows = scored_rows(recipe_of(name))
    order = np.random.default_rng(0).permutation(len(rows))
    assert curated(recipe_of(name), [rows[n] for n in order]).equals(default_batch(name).table)


ONE_PROMPT = {"rft": "duplicates and the number of rollouts are counted per prompt, whatever the group"}


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_told_apart_by_their_id_alone(name: str) -> None:
    """INCIDENT 14: rollouts of one prompt in two groups stay apart."""
    if name in ONE_PROMPT:
        pytest.skip(ONE_PROMPT[name])
    rows = [{**row, "prompt_id": "the same"} for row in scored_rows(recipe_of(name))]
    assert curated(recipe_of(name), rows).equals(default_batch(name).table)


NEIGHBOURS = {
    "reinforce": "the baseline is the mean of the batch",
    **dict.fromkeys(("d3s", "d3s-gspo"), "rows are chosen over the batch"),
    "rft": "duplicates are counted per prompt",
    "r2vpo": "as many groups are replayed as there are new ones",
    "distillm": "the share of the policy's groups goes by the loss of whole rounds",
    "sd-zero-srt": "weights make the batch's token mean the sum of two: they are of the tokens of all rows",
}


@pytest.mark.parametrize("name", NAMES)
def test_dropped_groups_leave_the_others_alone(name: str) -> None:
    """INCIDENTS 13, 14: what a row gets depends on its group, not on the rows before it."""
    if name in NEIGHBOURS:
        pytest.skip(NEIGHBOURS[name])
    rows = [row for row in scored_rows(recipe_of(name)) if row["group_id"] not in ("a", "d")]
    found = {(r["rollout_id"], r["slot"]): r for r in curated(recipe_of(name), rows).to_pylist()}
    before = {(r["rollout_id"], r["slot"]): r for r in default_batch(name).table.to_pylist()}
    assert found == {key: r for key, r in before.items() if r["group_id"] not in ("a", "d")}


@pytest.mark.parametrize("name", NAMES)
def test_order_of_batch_rows_and_names_of_groups_do_not_matter(name: str) -> None:
    """INCIDENT 14: rows shuffled and groups renumbered, the same loss, and each row its own gradient."""
    made = default_batch(name)
    batch, objective = made.tokens, made.objective
    expected, slopes = evaluated(batch, objective)
    order = torch.from_numpy(np.random.default_rng(5).permutation(batch.n_rows))
    shuffled = batch.rows(order)
    assert shuffled.group is not None
    shuffled = replace(shuffled, group=1000 - 7 * shuffled.group)
    value = loss(shuffled, objective).loss
    torch.testing.assert_close(value.detach(), expected, atol=1e-12, rtol=0)
    close(gradients(value, batch), slopes)


@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_have_no_gradient_and_no_say(name: str, garbage: float) -> None:
    """INCIDENTS 12, 20, 21: their gradient is exactly 0, and whatever stands there changes no bit."""
    clean = make_batch(recipe_of(name), fill=0.0) if garbage == 1e30 else default_batch(name)
    dirty = make_batch(recipe_of(name), fill=garbage)
    a, b = evaluated(clean.tokens, clean.objective), evaluated(dirty.tokens, dirty.objective)
    assert bool(b[0].isfinite())
    assert torch.equal(a[0], b[0])
    mask = dirty.tokens.mask
    assert not bool(mask.all())
    for leaf in b[1]:
        assert torch.equal(a[1][leaf][mask], b[1][leaf][mask])
        assert not bool(b[1][leaf][~mask].any())


@pytest.mark.parametrize("distance", [300.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype, distance: float) -> None:
    """Log-ratios of +-distance against the old, the engine's and the reference policy, in turns and all one way."""
    made = make_batch(recipe_of(name), dtype)
    shape = made.tokens.logp.shape
    near = torch.full(shape, -1e-6, dtype=dtype)
    turns = torch.where(torch.arange(shape[1]) % 2 == 0, -distance, -1e-6).to(dtype).expand(shape)
    for now, old in (
        (turns, made.tokens.logp_old),
        (turns, turns.flip(1)),
        (near - distance, near),
        (near, near - distance),
    ):
        batch = replace(made.tokens, logp=now.clone().requires_grad_())
        value, found = evaluated(replace(batch, logp_old=old, logp_behavior=old, logp_ref=old), made.objective)
        assert value.dtype == dtype
        assert bool(value.isfinite())
        assert all(bool(g.isfinite().all()) for g in found.values())


def all_alike(rewards: Sequence[float], name: str) -> Synthetic:
    """Four groups, of 4, 3, 2 and 1, whose rewards are all the same within the group."""
    rows = []
    for row in scored_rows(recipe_of(name)):
        place = "aced".find(row["group_id"])
        if place >= 0 and row["sample"] < 4 - place and row["source"] == "policy":
            reward = rewards[place]
            rows.append({**row, "reward": reward, "correct": reward >= 1.0})
    return make_batch(recipe_of(name), rows=rows)


ALIKE = {
    "one value": (0.6,) * 4,
    "all wrong": (0.0,) * 4,
    "all right": (1.0,) * 4,
    "mixed groups": (1.0, 0.0, 1.0, 0.6),
}

# methods/baselines: equal rewards carry no signal. Not here, because their definition gives one: ngrpo (virtual
# samples), reinforce++ (KL in the reward), ppo and pf-ppo (critic), dcpo (right rows are mixed in), r2vpo (the
# penalty), psr, nsr and w-reinforce (constants), rein-capo (the reward itself), sft and rft (imitation), the
# preferences, and reinforce where groups differ.
OF_OTHERS = ("otr", "otr-exact", "dft", "spin", "distillm", "expo-dpo", "sd-zero-srt")
"""Recipes that learn from experts', explanations' or revisions' rows, of which these batches have none."""
NO_SIGNAL = (
    *("gad", "expo"),
    *("grpo", "dapo", "dr-grpo", "gspo", "gspo-token", "cispo", "tis", "mis", "rloo", "sapo", "capo", "dr-capo", "d3s"),
    *("srpo", "d3s-gspo", "fiberpo", "fiberpo-domain", "dagrpo", "reinforce-plus-plus-baseline"),
)


@pytest.mark.parametrize("rewards", ALIKE.values(), ids=ALIKE.keys())
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_groups_are_defined(name: str, rewards: tuple[float, ...]) -> None:
    """INCIDENT 15: no NaN for equal rewards, all right, all wrong, a group of one; exactly 0 without a signal."""
    made = all_alike(rewards, name)
    value, found = evaluated(made.tokens, made.objective)
    assert bool(value.isfinite())
    assert all(bool(g.isfinite().all()) for g in found.values())
    if name in NO_SIGNAL or (name == "reinforce" and len(set(rewards)) == 1):
        assert float(value) == 0.0
        assert not bool(found["logp"].any())


def test_recipes_without_signal_are_the_ones_of_the_baselines() -> None:
    """The list above leaves nobody out by mistake: every other recipe does move on some of these batches."""
    for name in set(NAMES) - {*NO_SIGNAL, "dpo", "ipo", *OF_OTHERS}:
        moved = False
        for rewards in ALIKE.values():
            made = all_alike(rewards, name)
            moved = moved or bool(pull(evaluated(made.tokens, made.objective)[1]).any())
        assert moved, name


OTHER_AT_ONE = {
    **dict.fromkeys(PREFERENCE, "a loss over pairs: its gradient depends on the reference"),
    **dict.fromkeys(("otr", "otr-exact", "dft", "seqkd"), "imitation: there is no advantage"),
    **dict.fromkeys(("opd", "gkd"), "a teacher's divergence: there is no advantage"),
    **dict.fromkeys(("distillm", "distillm-2", "todi", "akl"), "a teacher's divergence: there is no advantage"),
    **dict.fromkeys(("sdpo", "opsd", "sd-zero"), "a teacher's divergence: there is no advantage"),
    "sd-zero-srt": "imitation: there is no advantage",
    "srpo": "wrong rows with a right sibling get the teacher's divergence in place of the policy's loss",
    "scope": "wrong rows get the teacher's divergence in place of the policy's loss",
    "sft": "imitation: -grad logp, whatever the advantage",
    "rft": "imitation: -grad logp, whatever the advantage",
    "d3s-gspo": "the sequence ratio reads all valid tokens of a row: those that are not kept share its gradient",
}


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_one_the_gradient_is_the_policy_gradient(name: str) -> None:
    """INCIDENTS 2, 16: coefficient -A of grad logp under the recipe's own aggregation, scale exactly 1."""
    if name in OTHER_AT_ONE:
        pytest.skip(OTHER_AT_ONE[name])
    made = default_batch(name)
    objective = made.objective
    old = made.tokens.logp.detach().clone()
    batch = prepare(replace(made.tokens, logp_old=old, logp_behavior=old), objective, progress=0.4)
    result = loss(batch, objective)
    assert batch.advantage is not None
    a = batch.advantage if batch.advantage.dim() == 2 else batch.advantage[:, None]
    own = result.kept & ~imitated_rows(batch, objective)
    expected = torch.where(own, -a * share_of(own, batch, objective), 0.0)
    if objective.imitate is not None:
        groups = len(batch.group[batch.mask.any(1)].unique())
        beta = imitation_weight(objective.imitate, 0.4)
        expected = torch.where(result.kept & ~own, -beta * batch.weight[:, None] / groups, expected)
    torch.testing.assert_close(gradients(result.loss, batch)["logp"], expected, atol=1e-12, rtol=0)
    assert bool(expected.any())


def share_of(kept: Tensor, batch: TokenBatch, objective: Objective) -> Tensor:
    """[N, T]: d loss / d token loss, from the definitions of the aggregations."""
    weight = batch.weight[:, None] * torch.ones_like(kept, dtype=torch.float64)
    count = kept.sum(1, keepdim=True).double()
    counted = weight if objective.aggregate.weights == "denominator" else torch.ones_like(weight)
    # Imitated rows have no part in other means, not as rows without a token either.
    counted = torch.where(imitated_rows(batch, objective), 0.0, counted)
    match objective.aggregate:
        case TokenMean():
            return weight / counted[kept].sum()
        case SeqMeanTokenMean(empty=empty):
            rows = counted[:, 0].sum() if empty == "zero" else counted[kept.any(1), 0].sum()
            return weight / count.clamp(min=1) / rows
        case SeqMeanTokenSum(empty=empty):
            rows = counted[:, 0].sum() if empty == "zero" else counted[kept.any(1), 0].sum()
            return weight / rows
        case SeqSumConst(l_max=l_max):
            return weight / (l_max * counted[:, 0].sum())
        case GroupMeanTokenSum():
            return weight / len({*batch.group[kept.any(1) & (weight[:, 0] != 0)].tolist()})
    raise AssertionError(objective.aggregate)


@pytest.mark.parametrize("name", NAMES)
def test_a_pad_that_is_the_end_token_is_told_by_length(name: str) -> None:
    """INCIDENTS 11, 12: the first EOS is trained on, the pads after it are not, though all have one id."""
    assert PAD == EOS
    made = default_batch(name)
    batch = made.tokens
    lengths = torch.tensor([len(row.tokens) for row in made.rows.rows])
    last = (torch.arange(batch.n_rows), lengths - 1)
    assert bool((batch.token_ids[last] == EOS).all())
    assert bool(batch.mask[last].all())
    assert not bool(batch.mask[torch.arange(batch.mask.shape[1])[None] >= lengths[:, None]].any())
    value, slopes = evaluated(batch, made.objective)
    if "token_ids" not in _read_by(made.objective):
        same = replace(batch, token_ids=torch.full_like(batch.token_ids, EOS))
        assert torch.equal(evaluated(same, made.objective)[0], value)
    assert bool(pull(slopes)[last].any())
    assert not bool(pull(slopes)[batch.token_ids.eq(PAD) & ~batch.mask].any())


def _read_by(objective: Objective) -> tuple[str, ...]:
    return ("token_ids",) if objective.select.kind == "curvature" else ()


@pytest.mark.parametrize("how", ["weight 0", "no token"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_fill_up_a_batch_change_nothing(name: str, how: str) -> None:
    """INCIDENT 31: copies of real rows and pairs, of weight 0 or wholly masked."""
    made = default_batch(name)
    objective, batch = made.objective, prepared(made)
    expected, slopes = evaluated(batch, objective)
    n = batch.n_rows
    extra = [*made.pairs[0]] if made.pairs else [0, n // 2, n - 1]
    filled = batch.rows(torch.tensor([*range(n), *extra]), split_pairs=True)
    given = totals(batch, objective)
    if how == "weight 0":
        filled = replace(filled, weight=torch.cat([batch.weight, torch.zeros(len(extra), dtype=batch.logp.dtype)]))
        # A token mean whose weights are in the numerator alone counts them; its totals are those of the real batch.
        whole = given if name == "sd-zero-srt" else None
    else:
        filled = replace(filled, mask=torch.cat([batch.mask, torch.zeros_like(batch.mask[extra])]))
        # Masked rows still are rows where the method counts them; the totals are those of the real batch.
        whole = None if unit(objective) == "batch" else given
    if made.pairs:
        chosen, rejected = torch.tensor(made.pairs).T
        more = [n, n + 1]
        filled = replace(
            filled,
            pair_chosen=torch.cat([chosen, torch.tensor(more[:1])]),
            pair_rejected=torch.cat([rejected, torch.tensor(more[1:])]),
        )
        if how == "no token":
            filled = replace(filled, pair_chosen=chosen, pair_rejected=rejected)
    value = loss(filled, objective, totals=whole).loss
    torch.testing.assert_close(value.detach(), expected, atol=1e-12, rtol=0)
    close(gradients(value, batch), slopes)


@pytest.mark.parametrize("name", POLICY)
def test_a_batch_without_a_token_is_zero(name: str) -> None:
    made = default_batch(name)
    empty = replace(made.tokens, mask=torch.zeros_like(made.tokens.mask))
    value, slopes = evaluated(empty, made.objective)
    assert float(value) == 0.0
    assert not any(bool(g.any()) for g in slopes.values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", POLICY)
def test_a_kl_term_added_to_the_recipe_has_a_gradient(name: str, kind: str) -> None:
    """INCIDENT 6: d loss / d parameters moves with beta, and in proportion to it."""
    made = default_batch(name)
    batch = prepared(made)
    found = []
    for beta in (0.0, 0.1, 0.2):
        kl = recipe_of("grpo").train.objective.kl if beta == 0.0 else KlPenalty(kind=kind, beta=beta)
        found.append(evaluated(batch, made.objective.model_copy(update={"kl": kl}))[1]["logp"])
    assert bool((found[1] - found[0]).any())
    torch.testing.assert_close(found[2] - found[0], 2 * (found[1] - found[0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_losses_read_completions_only(name: str) -> None:
    """INCIDENT 27: no reference log-prob outside the mask counts, and at the reference DPO's loss is log 2."""
    made = default_batch(name)
    shifted = {f: torch.where(made.tokens.mask, getattr(made.tokens, f), 5.0) for f in ("logp", "logp_ref")}
    moved = loss(replace(made.tokens, **shifted), made.objective).loss
    assert torch.equal(moved, loss(made.tokens, made.objective).loss)
    if name == "dpo":
        at_reference = replace(made.tokens, logp_ref=made.tokens.logp.detach())
        assert float(loss(at_reference, made.objective).loss.detach()) == pytest.approx(np.log(2), rel=1e-12)
