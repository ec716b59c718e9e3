"""CAPO's sentence and batch versions (eq. 12) against whole V x H matrices, real steps, and the token level."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from objectives.rows import parse
from objectives.test_capo import CLIP, HEAD, worked
from rollway.config.objectives import Objective
from rollway.errors import RollwayError
from rollway.objectives import TokenBatch, initial_state, loss, next_state, separable, totals, unit

LEVELS = ["sequence", "batch"]
V, H = 7, 3
INF = math.inf


def capo(level: str, tau_f: float = INF, tau_h: float = INF, k: int = V, **more: Any) -> Objective:
    direction = more.pop("direction", "sgd")
    return parse(
        ratio="token",
        gate=CLIP,
        aggregate={"kind": "seq_mean_token_mean", "empty": "zero"},
        select={
            "kind": "curvature",
            "level": level,
            "tau_f": tau_f,
            "tau_h": tau_h,
            "k": k,
            "direction": direction,
            **more,
        },
    )


def batch(lengths: tuple[int, ...] = (3, 5, 1, 0, 4), seed: int = 0, **fields: Any) -> TokenBatch:
    """Rows of these lengths, the second with a hole; NaN where masked."""
    g = torch.Generator().manual_seed(seed)
    n, width = len(lengths), max(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    if n > 1 and width > 2:
        mask[1, 1] = False
    old = torch.where(mask, -normal(n, width).abs(), torch.nan)
    given = {
        "logp": (old + 0.1 * normal(n, width)).requires_grad_(),
        "logp_old": old,
        "mask": mask,
        "advantage": normal(n),
        "hidden": torch.where(mask[:, :, None], normal(n, width, H), torch.nan),
        "lm_head": normal(V, H),
        "token_ids": torch.randint(0, V, (n, width), generator=g),
        "lr": 0.1,
    }
    return TokenBatch(**(given | fields))


def adam_state(seed: int = 3, seen: tuple[int, ...] = (0, 2, 3, 6), steps: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(len(seen), H, dtype=torch.float64, generator=g)
    second = torch.rand(len(seen), H, dtype=torch.float64, generator=g) + 0.1
    return {
        "curvature/ids": torch.tensor(seen),
        "curvature/first": 0.2 * first,
        "curvature/second": second,
        "curvature/steps": torch.tensor(steps),
    }


def dense(
    hidden: Tensor, head: Tensor, tokens: Tensor, advantage: Tensor, lr: float, k: int, state: dict[str, Tensor] | None
) -> tuple[float, float]:
    """Eq. 12 with matrices over all V ids, and F written out: m_H and m_F of the tokens given."""
    rows, size = head.shape
    gradient, seen = torch.zeros(rows, size, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    made = []
    for h, token, a in zip(hidden, tokens.tolist(), advantage.tolist(), strict=True):
        logits = head @ h
        inside = sorted(range(rows), key=lambda j: (-float(logits[j]), j))[:k]
        pi = torch.zeros(rows, dtype=torch.float64)
        pi[inside] = logits[inside].softmax(0)
        v = -pi
        if token in inside:
            v[token] += 1
        gradient += a * torch.outer(v, h)
        seen[inside] += 1
        made.append((h, a, v, pi))
    gradient = gradient / seen.clamp(min=1)[:, None]
    way = gradient
    if state is not None:
        first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        first[state["curvature/ids"]], second[state["curvature/ids"]] = (
            state["curvature/first"],
            state["curvature/second"],
        )
        power = int(state["curvature/steps"]) + 1
        m = (0.9 * first + 0.1 * gradient) / (1 - 0.9**power)
        q = (0.999 * second + 0.001 * gradient**2) / (1 - 0.999**power)
        way = m / (q.sqrt() + 1e-8)
    squares, curved = [], []
    for h, a, v, pi in made:
        u = way @ h
        fisher = torch.diag(pi) - torch.outer(pi, pi)
        squares.append(float(v @ u) ** 2)
        curved.append(a * (float(v @ u) ** 2 - float(u @ fisher @ u)))
    n = len(made)
    # Rows that no K contains have gradient 0; a moment there moves the direction, and <g, G> not.
    return lr * float((gradient * way).sum()) + lr**2 / 2 * sum(curved) / n, lr**2 / 2 * sum(squares) / n


def predicted(result: Any, row: int) -> tuple[float, float]:
    """m_H and m_F of a row, the same on all of its tokens."""
    out = []
    for name in ("curvature/m_h", "curvature/m_f"):
        values = result.per_token[name][row][result.kept[row]]
        assert len(set(values.tolist())) == 1
        out.append(float(values[0]))
    return out[0], out[1]


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("level", LEVELS)
def test_against_whole_matrices(level: str, direction: str, k: int) -> None:
    b = batch()
    state = adam_state() if direction == "adam" else None
    result = loss(b, capo(level, k=k, direction=direction), state=state or {})
    assert torch.equal(result.kept, b.mask)
    pieces = [[n] for n in range(5) if b.mask[n].any()] if level == "sequence" else [list(range(5))]
    for rows in pieces:
        where = b.mask[rows]
        advantage = b.advantage[rows][:, None].expand_as(where)[where]
        wanted = dense(b.hidden[rows][where], b.lm_head, b.token_ids[rows][where], advantage, 0.1, k, state)
        for row in rows:
            if b.mask[row].any():
                assert predicted(result, row) == pytest.approx(wanted, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("level", LEVELS)
def test_one_token_alone_is_the_token_level(level: str, direction: str) -> None:
    """For a batch: of one row of one token. Moments included."""
    b = batch((1, 1, 1) if level == "sequence" else (1,))
    state = adam_state() if direction == "adam" else {}
    fine = loss(b, capo("token", k=4, direction=direction), state=state)
    joint = loss(b, capo(level, k=4, direction=direction), state=state)
    assert bool(b.mask[0, 0])
    for name in ("curvature/m_h", "curvature/m_f"):
        torch.testing.assert_close(joint.per_token[name], fine.per_token[name], rtol=1e-12, atol=1e-16)
    for name, x in fine.state.items():
        torch.testing.assert_close(joint.state[name], x, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_a_batch_of_one_row_is_its_sentence(direction: str) -> None:
    b = batch((6,))
    state = adam_state() if direction == "adam" else {}
    sentence = loss(b, capo("sequence", k=4, direction=direction), state=state)
    whole = loss(b, capo("batch", k=4, direction=direction), state=state)
    assert torch.equal(sentence.loss, whole.loss)
    for name, x in sentence.per_token.items():
        assert torch.equal(whole.per_token[name], x)
    for name, x in sentence.state.items():
        assert torch.equal(whole.state[name], x)


@pytest.mark.parametrize("level", LEVELS)
def test_prediction_against_the_real_step(level: str) -> None:
    """k = V: after the step lr g, the mean of A (pi_new / pi - 1) over the tokens is m_H + O(lr^3)."""
    b = batch((4,) if level == "sequence" else (2, 3, 4), seed=5)
    h, tokens = b.hidden[b.mask], b.token_ids[b.mask]
    a = b.advantage[:, None].expand_as(b.mask)[b.mask]
    before = (h @ b.lm_head.T).log_softmax(1)
    v = torch.nn.functional.one_hot(tokens, V).double() - before.exp()
    gradient = (a[:, None] * v).T @ h / len(h)
    errors = []
    for lr in (1e-2, 5e-3):
        m_h, _ = predicted(loss(TokenBatch(**(vars(b) | {"lr": lr})), capo(level)), 0)
        after = (h @ (b.lm_head + lr * gradient).T).log_softmax(1)
        at = torch.arange(len(h)), tokens
        gain = float((a * ((after[at] - before[at]).exp() - 1)).mean())
        assert gain == pytest.approx(m_h, rel=0.05)
        errors.append(abs(gain - m_h))
    assert errors[1] < errors[0] / 7


def test_worked_batch_by_hand() -> None:
    """The sentences of the worked example: mean rows of both tokens, thresholds between the two sentences' changes."""
    b = worked()
    changes = []
    for n in range(2):
        state = None
        advantage = b.advantage[n].expand(2)
        changes.append(dense(b.hidden[n], HEAD, b.token_ids[n], advantage, 0.1, 3, state))
    assert changes[0][1] < changes[1][1]
    between = (changes[0][1] * changes[1][1]) ** 0.5
    result = loss(b, capo("sequence", tau_f=between, k=3))
    assert result.kept.tolist() == [[True, True], [False, False]]
    # A rejected row counts as 0 in the mean over rows.
    assert float(result.loss.detach()) == pytest.approx((-0.7071 - 0.77781) / 2 / 2, abs=1e-6)
    # Strict: a threshold at the value itself rejects.
    exact = predicted(loss(b, capo("sequence", k=3)), 1)[1]
    assert not bool(loss(b, capo("sequence", tau_f=exact, k=3)).kept[1].any())
    assert bool(loss(b, capo("sequence", tau_f=exact * (1 + 1e-12), k=3)).kept[1].all())


def test_a_batch_is_kept_or_dropped_whole() -> None:
    b = batch()
    m_h, m_f = predicted(loss(b, capo("batch")), 0)
    for tau, name in ((abs(m_h), "tau_h"), (m_f, "tau_f")):
        kept = loss(b, capo("batch", **{name: tau * 1.001}))
        assert torch.equal(kept.kept, b.mask)
        dropped = loss(b, capo("batch", **{name: tau * 0.999}))
        assert not bool(dropped.kept.any())
        assert float(dropped.loss.detach()) == 0.0
        assert float(dropped.metrics["kept_share"]) == 0.0


@pytest.mark.parametrize("direction", ["sgd", "adam"])
@pytest.mark.parametrize("level", LEVELS)
def test_chunks_change_nothing(level: str, direction: str) -> None:
    b, state = batch(), adam_state() if direction == "adam" else {}
    one = loss(b, capo(level, k=4, direction=direction, chunk=1), state=state)
    other = loss(b, capo(level, k=4, direction=direction, chunk=2), state=state)
    whole = loss(b, capo(level, k=4, direction=direction), state=state)
    for result in (one, other):
        for name, x in (whole.per_token | whole.state).items():
            torch.testing.assert_close((result.per_token | result.state)[name], x, atol=1e-14, rtol=1e-12)


def test_moments_are_of_the_kept_sentences() -> None:
    """Eq. 7: what a step on the kept rows alone would leave."""
    b = batch()
    open_ = loss(b, capo("sequence", direction="adam"))
    changes = [predicted(open_, n)[1] for n in (0, 1, 2, 4)]
    tau = sorted(changes)[1] * 1.001
    objective = capo("sequence", tau_f=tau, direction="adam")
    result = loss(b, objective)
    rows = result.kept.any(1).nonzero()[:, 0]
    assert len(rows) == 2
    alone = loss(b.rows(rows), capo("sequence", direction="adam"))
    for name, x in alone.state.items():
        torch.testing.assert_close(result.state[name], x, atol=1e-15, rtol=0)
    assert not torch.equal(result.state["curvature/first"], open_.state["curvature/first"])


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_that_keeps_nothing_counts_and_moves_no_moment(level: str) -> None:
    objective, state = capo(level, tau_f=0.0, direction="adam"), adam_state()
    for b in (batch(), batch(mask=torch.zeros(5, 5, dtype=torch.bool))):
        after = loss(b, objective, state=state).state
        assert int(after["curvature/steps"]) == 3
        assert torch.equal(after["curvature/ids"], state["curvature/ids"])
        assert torch.equal(after["curvature/first"], state["curvature/first"])


def test_sentences_are_separable_and_batches_are_not() -> None:
    assert separable(capo("sequence"))
    assert unit(capo("batch")) == "batch"
    b, objective = batch(), capo("sequence", tau_f=1e-4, direction="adam")
    whole, given = loss(b, objective), totals(b, objective)
    parts = [loss(b.rows(rows), objective, totals=given) for rows in ([0, 3], [1], [2, 4])]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, atol=1e-14, rtol=0)
    a, c, d = (p.partials for p in parts)
    summed = {name: a[name] + c[name] + d[name] for name in whole.partials}
    for name, x in next_state(objective, initial_state(objective), summed).items():
        torch.testing.assert_close(x, whole.state[name], atol=1e-15, rtol=0)


def test_a_part_of_a_batch_cannot_be_judged() -> None:
    b, objective = batch(), capo("batch")
    given = totals(b, objective)
    with pytest.raises(RollwayError, match="whole batch"):
        loss(b.rows([0, 1]), objective, totals=given)
    assert torch.equal(loss(b, objective, totals=given).loss, loss(b, objective).loss)
