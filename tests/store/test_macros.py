"""The views and macros of workflow/sql/views against plain Python on random results."""

import math
import random
from collections import Counter
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rollway.errors import RollwayError
from rollway.evaluation.pass_at_k import maj_at_k, normalise
from rollway.store.catalog import open_catalog, run_sql, write_database
from rollway.store.views import documented
from store.synthetic import add_teacher, make_results, rollout_rows, write, write_prompts, write_run_info

ANSWERS = ["7", " 7.", "Seven", "seven  ", "12", "", "x y", "X  y.", "x\u00a0y", "X\u2003\x1fy .", "Straße", "STRASSE."]
ANSWERS += ["ΣΊΣΥΦΟΣ", "σίσυφος", "ﬁve", "FIVE", "\u13a0", "\uab70"]


def evals(rng: random.Random, prompts: int = 6, samples: int = 7) -> list[dict[str, Any]]:
    rows = []
    for prompt in range(prompts):
        for sample in range(samples - prompt % 2):
            tokens = [rng.randrange(3) for _ in range(rng.randrange(6))]
            rows.append(
                {
                    "prompt_id": f"heldout-{prompt}",
                    "sample": sample,
                    "correct": rng.random() < 0.5,
                    "reward": 0.0,
                    "length": len(tokens),
                    "finish": "stop",
                    "text": "t",
                    "answer": rng.choice(ANSWERS),
                    "tokens": tokens,
                    "logprobs": [-rng.random() for _ in tokens],
                }
            )
    return rows


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    root, rng = tmp_path_factory.mktemp("judged"), random.Random(3)
    write_prompts(root)
    write_run_info(root, "a-s0")
    rows = {round: evals(rng) for round in (0, 1)}
    for round, part in rows.items():
        write(root / "a-s0" / f"r{round:04d}" / "evals.parquet", part, "evals")
    return root, rows


def ask(results: Path, query: str) -> list[tuple[Any, ...]]:
    with open_catalog(results) as catalog:
        return catalog.execute(query).fetchall()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 7])
def test_maj_at_k_is_the_metric_of_the_same_name(judged: Any, k: int) -> None:
    results, rounds = judged
    for round, rows in rounds.items():
        expected = []
        for prompt in sorted({row["prompt_id"] for row in rows}):
            mine = [row for row in rows if row["prompt_id"] == prompt]
            if len(mine) >= k:
                expected.append(maj_at_k([r["answer"] for r in mine], [r["correct"] for r in mine], k))
        found = ask(results, f"SELECT prompts, maj FROM maj_at_k({k}) WHERE round = {round}")
        assert found == [(len(expected), pytest.approx(sum(expected) / len(expected), abs=1e-12))]


def test_answers_are_the_same_where_the_metric_takes_them_for_the_same(tmp_path: Path) -> None:
    """Every letter there is, within words and at their ends; and white space, of which Unicode has more than ASCII."""
    letters = [chr(n) for n in range(0x110000) if not 0xD800 <= n <= 0xDFFF]
    texts = [f"{a}x{a} {a}{a}.{a} ." for a in letters] + ANSWERS
    with open_catalog(tmp_path) as catalog:
        catalog.register("given", pa.table({"n": range(len(texts)), "text": texts}))
        found = catalog.execute("SELECT normalised(text) FROM given ORDER BY n").fetchall()
    pairs = {(normalise(text), answer) for text, (answer,) in zip(texts, found, strict=True)}
    # Cherokee folds to the other case, which tells apart as much: one form here for each form there.
    assert len(pairs) == len({wanted for wanted, _ in pairs}) == len({answer for _, answer in pairs})
    assert {wanted for wanted, answer in pairs if wanted != answer} <= {
        wanted for wanted, _ in pairs if any("\u13a0" <= c <= "\u13fd" for c in wanted)
    }


def test_maj_at_k_by_enumeration_of_all_draws(judged: Any) -> None:
    """Neither the macro nor the metric: every one of the C(n, 3) draws, its most frequent answers by lot."""
    results, rounds = judged
    chances = []
    for prompt in sorted({row["prompt_id"] for row in rounds[0]}):
        mine = [(normalise(r["answer"]), r["correct"]) for r in rounds[0] if r["prompt_id"] == prompt]
        share = {a: sum(c for b, c in mine if b == a) / sum(b == a for b, _ in mine) for a, _ in mine}
        draws = []
        for draw in combinations(mine, 3):
            votes = Counter(answer for answer, _ in draw)
            best = [a for a, n in votes.items() if n == max(votes.values())]
            draws.append(sum(share[a] for a in best) / len(best))
        chances.append(sum(draws) / len(draws))
    found = ask(results, "SELECT maj FROM maj_at_k(3) WHERE round = 0")
    assert found[0][0] == pytest.approx(sum(chances) / len(chances), abs=1e-12)


def test_votes_add_up(judged: Any) -> None:
    results, rounds = judged
    for prompt, n, votes in ask(
        results, "SELECT prompt_id, any_value(n), sum(votes) FROM votes WHERE round = 0 GROUP BY prompt_id"
    ):
        assert n == votes == sum(row["prompt_id"] == prompt for row in rounds[0])


def test_drift_on_the_tokens_that_two_policies_share(judged: Any) -> None:
    results, rounds = judged
    found = {
        row[0]: row[1:]
        for row in ask(
            results, "SELECT prompt_id, samples, shared, log_ratio, gap, same_answer FROM drift('a-s0', 0, 'a-s0', 1)"
        )
    }
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for a in rounds[0]:
        for b in rounds[1]:
            if (a["prompt_id"], a["sample"]) == (b["prompt_id"], b["sample"]):
                pairs.setdefault(a["prompt_id"], []).append((a, b))
    assert set(found) == set(pairs)
    for prompt, both in pairs.items():
        gaps, lengths = [], 0
        for a, b in both:
            lengths += len(a["tokens"])
            for n, (s, t) in enumerate(zip(a["tokens"], b["tokens"], strict=False)):
                if s != t:
                    break
                gaps.append(b["logprobs"][n] - a["logprobs"][n])
        samples, shared, ratio, gap, same = found[prompt]
        assert (samples, shared) == (len(both), pytest.approx(len(gaps) / lengths))
        assert ratio == (pytest.approx(sum(gaps) / len(gaps), abs=1e-6) if gaps else None)
        assert gap == (pytest.approx(sum(map(abs, gaps)) / len(gaps), abs=1e-6) if gaps else None)
        assert same == pytest.approx(sum(a["answer"] == b["answer"] for a, b in both) / len(both))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repetition_is_the_share_of_repeated_n_grams(tmp_path: Path, n: int) -> None:
    rng = random.Random(n)
    lists = [[rng.randrange(3) for _ in range(length)] for length in (*range(7), 40)]
    for items in lists:
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        expected = None if not grams else pytest.approx(1 - len(set(grams)) / len(grams))
        assert ask(tmp_path, f"SELECT repetition({items}::INT[], {n})") == [(expected,)]
    assert ask(tmp_path, "SELECT repetition(string_split('a b a b a', ' '), 2)") == [(0.5,)]
    assert ask(tmp_path, "SELECT repetition(NULL::INT[], 2), shared_prefix([1, 2], NULL::INT[])") == [(None, None)]


def test_shared_prefix(tmp_path: Path) -> None:
    cases = [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 1), ([2], [1], 0), ([], [1], 0), ([1, 2], [1, 2], 2)]
    for a, b, expected in cases:
        assert ask(tmp_path, f"SELECT shared_prefix({a}::INT[], {b}::INT[])") == [(expected,)]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT pass_at_k(4, 2, -2)", "pass_at_k: k = -2; k must be at least 1"),
        ("SELECT pass_at_k(4, 2, 0)", "pass_at_k: k = 0; k must be at least 1"),
        ("SELECT pass_at_k(4, 5, 2)", "pass_at_k: 5 right of 4 samples is impossible"),
        ("SELECT pass_at_k(4, -1, 2)", "pass_at_k: -1 right of 4 samples is impossible"),
        ("SELECT avg_at_k(4, 5)", "avg_at_k: 5 right of 4 samples is impossible"),
        ("FROM maj_at_k(0)", "maj_at_k: k = 0; k must be at least 1"),
        ("FROM maj_at_k(-1)", "maj_at_k: k = -1; k must be at least 1"),
        ("FROM maj_at_k(99)", "maj_at_k: k = 99 exceeds the samples of every prompt, at most 7; take a smaller k"),
        ("SELECT maj FROM maj_at_k(99) WHERE round = 0", "maj_at_k: k = 99 exceeds the samples of every prompt"),
        ("FROM drift('b-s0', 0, 'a-s0', 1)", "drift: run b-s0 has no evaluation of round 0; see SELECT run, round"),
        ("FROM drift('a-s0', 0, 'a-s0', 7)", "drift: run a-s0 has no evaluation of round 7"),
        ("SELECT avg(gap) FROM drift('a-s0', 0, 'b-s0', 1)", "drift: run b-s0 has no evaluation of round 1"),
        ("SELECT flip FROM flips('a-s0', 5, 'a-s0', 1)", "flips: run a-s0 has no evaluation of round 5"),
        ("SELECT count(*) FROM flips('a-s0', 0, 'b-s0', 1)", "flips: run b-s0 has no evaluation of round 1"),
    ],
)
def test_questions_without_a_meaning_are_refused(judged: Any, query: str, says: str) -> None:
    with pytest.raises(RollwayError) as raised:
        run_sql(judged[0], query)
    assert says in str(raised.value)


def test_flips(judged: Any) -> None:
    results, rounds = judged
    share = {}
    for round, rows in rounds.items():
        for prompt in {row["prompt_id"] for row in rows}:
            right = [row["correct"] for row in rows if row["prompt_id"] == prompt]
            share[round, prompt] = sum(right) / len(right)
    found = ask(results, "SELECT prompt_id, right_a, right_b, flip FROM flips('a-s0', 0, 'a-s0', 1)")
    assert len(found) == 6
    for prompt, before, after, flip in found:
        assert (before, after) == (pytest.approx(share[0, prompt]), pytest.approx(share[1, prompt]))
        assert flip == ("same" if (before >= 0.5) == (after >= 0.5) else "right" if after >= 0.5 else "wrong")


def test_tokens_have_a_row_each(tmp_path: Path) -> None:
    make_results(tmp_path, {"a-s0": 1})
    rows = ask(
        tmp_path, "SELECT position, token, logprob, entropy, trained FROM tokens WHERE rollout_id = 'a-s0-0-1-0'"
    )
    assert rows == [
        (0, 5, pytest.approx(-0.1), None, True),
        (1, 6, pytest.approx(-2.0), None, True),
        (2, 2, pytest.approx(-4.0), None, False),
    ]


def test_best_worst_duplicates_and_learning(tmp_path: Path) -> None:
    """Group 2 has one right rollout of four; the texts of a group are alike but for one."""
    make_results(tmp_path, {"a-s0": 2})
    rows = rollout_rows("a-s0", 0)
    rows[1]["text"] = "other"
    expert = rows[-1] | {"rollout_id": "expert", "sample": 4, "source": "expert"}
    write(tmp_path / "a-s0/r0000/p0/rollouts-000.parquet", [*rows, expert], "rollouts")
    (tmp_path / "a-s0/r0000/p0/rollouts-001.parquet").unlink()
    found = ask(tmp_path, "SELECT group_id, best, worst, best_text FROM best_worst WHERE round = 0")
    assert found == [("0-2", "a-s0-0-2-0", "a-s0-0-2-1", "abc")]
    found = ask(tmp_path, "SELECT group_id, samples, distinct_texts, copies, share FROM duplicates WHERE round = 0")
    assert sorted(found) == [("0-0", 4, 2, 3, 0.5), ("0-1", 4, 1, 4, 0.75), ("0-2", 4, 1, 4, 0.75)]
    found = ask(tmp_path, "SELECT rounds, shares, gain FROM learning_by_prompt WHERE prompt_id = 'heldout-0'")
    assert found == [([0, 1, 2], [0.25, 0.5, 0.75], 0.5)]
    found = ask(tmp_path, "SELECT split, rounds, last FROM learning_by_prompt WHERE prompt_id = 'train-1'")
    assert found == [("train", [0, 1], 0.25)]


def test_best_worst_and_signal_by_rewards_that_are_numbers(tmp_path: Path) -> None:
    """NaN, infinities and nothing count neither as best nor as signal; of equals the first sample, in both views."""
    rng = random.Random(5)
    values = [math.nan, math.inf, -math.inf, None, 0.0, 1.0, 2.0]
    rows, scores = [], []
    for group in range(60):
        for sample in rng.sample(range(5), 5):
            name = f"{group}-{sample}-{rng.random()}"
            base = rollout_rows("a-s0", 0)[0]
            rows.append(base | {"rollout_id": name, "group_id": f"0-{group}", "sample": sample, "text": name})
            reward = rng.choice(values if group else values[:4])
            if reward is not None:
                scores.append({"rollout_id": name, "scorer": "exact", "reward": reward, "components": []})
    write_prompts(tmp_path)
    write(tmp_path / "a-s0/r0000/p0/rollouts-000.parquet", rows, "rollouts")
    write(tmp_path / "a-s0/r0000/p0/scores/exact-000.parquet", scores, "scores")
    reward_of = {score["rollout_id"]: score["reward"] for score in scores}
    groups, sides = {}, {}
    for group in {row["group_id"] for row in rows}:
        mine = sorted((row["sample"], row["rollout_id"]) for row in rows if row["group_id"] == group)
        known = [(reward_of[name], name) for _, name in mine if math.isfinite(reward_of.get(name, math.nan))]
        best, worst = max(known, key=itemgetter(0), default=None), min(known, key=itemgetter(0), default=None)
        mean = pytest.approx(sum(r for r, _ in known) / len(known)) if known else None
        groups[group] = (mean, best and best[0] > worst[0], best and best[1], worst and worst[1])
        if best and best[0] > worst[0]:
            sides[group] = (*best, *worst)
    found = ask(tmp_path, "SELECT group_id, reward, signal, best, worst FROM groups")
    assert {group: tuple(rest) for group, *rest in found} == groups
    assert groups["0-0"] == (None, None, None, None)
    found = ask(tmp_path, "SELECT group_id, best_reward, best, worst_reward, worst FROM best_worst")
    assert {group: tuple(rest) for group, *rest in found} == sides


def test_macros_work_in_the_database_file(judged: Any) -> None:
    import duckdb

    results, _ = judged
    path = write_database(results)
    with duckdb.connect(str(path), read_only=True) as client:
        for view in documented():
            client.execute(view.example.replace("grpo-s0", "a-s0")).fetchall()
        kinds = client.execute("SELECT count(*) FROM duckdb_functions() WHERE NOT internal").fetchone()
    assert kinds == (sum(view.kind == "macro" for view in documented()),)


def test_examples_ask_for_nothing_that_is_not_there(tmp_path: Path) -> None:
    """Every documented example gives rows on a folder that has every table."""
    make_results(tmp_path, {"grpo-s0": 2})
    add_teacher(tmp_path, "grpo-s0", 2)
    for view in documented():
        assert ask(tmp_path, view.example), view.name
