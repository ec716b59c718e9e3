"""Choice of prompts, and ids."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.sampling.prompts import epoch_block, groups, refill, rollout_id, rollout_key, shard_slice


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 6), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(size, prompts, rounds, seed):
    ids = [f"p{i}" for i in range(size)]
    stream = [p for r in range(rounds) for p in epoch_block(ids, seed=seed, round=r, prompts=prompts)]
    assert len(stream) == rounds * prompts
    for start in range(0, len(stream) - size + 1, size):
        assert Counter(stream[start : start + size]) == Counter(ids)


def test_order_of_the_prompts_does_not_matter():
    ids = [f"p{i}" for i in range(20)]
    assert epoch_block(ids, seed=1, round=2, prompts=7) == epoch_block(ids[::-1], seed=1, round=2, prompts=7)
    assert epoch_block(ids, seed=1, round=0, prompts=20) != epoch_block(ids, seed=2, round=0, prompts=20)
    assert epoch_block(ids, seed=1, round=0, prompts=20) != epoch_block(ids, seed=1, round=1, prompts=20)


def test_an_offset_passes_over_what_a_parent_asked():
    """SD-Zero: one round of 12 prompts, and a fork whose rounds 1, 2 and 3 of 3 go on behind them."""
    ids = [f"p{i}" for i in range(21)]
    parent = epoch_block(ids, seed=1, round=0, prompts=12)
    fork = [p for r in (1, 2, 3) for p in epoch_block(ids, seed=1, round=r, prompts=3, offset=9)]
    assert Counter(parent + fork) == Counter(ids)


def test_refill_takes_unused_prompts():
    ids = [f"p{i}" for i in range(10)]
    used = set(epoch_block(ids, seed=0, round=3, prompts=4))
    more = refill(ids, used, seed=0, round=3, need=3)
    assert len(set(more)) == 3
    assert not used & set(more)
    assert refill(ids, used, seed=0, round=3, need=99)[:3] == more
    assert len(refill(ids, used, seed=0, round=3, need=99)) == 6
    assert refill(ids, set(ids), seed=0, round=3, need=1) == []


def test_ids():
    key = rollout_key("ab", "cd", {"round": 1, "pass": 0, "temperature": 1.0})
    assert len(key) == 12
    assert key == rollout_key("ab", "cd", {"temperature": 1.0, "pass": 0, "round": 1})
    assert key != rollout_key("ab", "cd", {"temperature": 1.0, "pass": 1, "round": 1})
    made = groups(key, ["x", "y", "x"])
    assert [(g.group_id, g.prompt_id, g.index) for g in made][2] == (f"{key}-00002", "x", 2)
    assert len({g.group_id for g in made}) == 3
    assert rollout_id(made[0].group_id, 7) == f"{key}-00000-0007"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100), st.integers(1, 12))
def test_shards_are_contiguous_even_and_whole(n, shards):
    parts = [list(range(n))[shard_slice(n, s, shards)] for s in range(shards)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
