"""Stored completions: which of them a group takes, and the rows they become."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.conftest import ALPHABET
from rollway.config import load_recipe
from rollway.config.base import ConfigError
from rollway.config.policies import CharTokenizer
from rollway.config.rollouts import StoredEngine
from rollway.engines import make
from rollway.errors import RollwayError
from rollway.policies.causal_lm import Reader
from rollway.policies.tokenizers import char_tokenizer
from rollway.sampling import stored
from rollway.sampling.prompts import Group, groups
from rollway.store import parquet
from rollway.store.tables import ROLLOUTS

TOKENIZER = char_tokenizer(CharTokenizer(alphabet=ALPHABET))
READER = Reader(TOKENIZER, len(TOKENIZER), 96)
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def row(name: str, prompt: str, text: str, **changes: Any) -> dict[str, Any]:
    """A stored rollout of `prompt`, by another policy, with its own token ids."""
    tokens = changes.pop("tokens", [*ids(text), EOS])
    return {
        **dict.fromkeys(("round", "pass", "policy_round", "sample"), 3),
        "rollout_id": name,
        "policy": "mu",
        "group_id": "theirs",
        "prompt_id": prompt,
        "source": "policy",
        "finish": "stop",
        "length": len(tokens),
        "engine": "transformers",
        "sampling": '{"temperature": 0.7}',
        "prompt_tokens": ids(prompt),
        "tokens": tokens,
        "logprobs": [-0.25] * len(tokens),
        "train_mask": [True] * len(tokens),
        "segments": [],
        "text": text,
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write(path, pa.Table.from_pylist(rows, schema=ROLLOUTS.schema()), "rollouts")
    return path


def asked(*prompts: str) -> pa.Table:
    messages = [json.dumps([{"role": "user", "content": p}]) for p in prompts]
    return pa.table({"prompt_id": list(prompts), "messages": messages, "meta": ['{"format": "plain"}'] * len(prompts)})


def rows_of(files: list[Path], prompt: str = "1+1=", count: int = 2, reader: Reader = READER) -> list[dict[str, Any]]:
    shelf = stored.shelve(files)
    group = groups("key", [prompt])[0]
    taken = {group.group_id: stored.take(shelf, group, count, seed=0, round=0)}
    made = stored.StoredRows(shelf, reader, asked(prompt), taken, round=5, pass_number=0)
    return made.generate([(group, sample) for sample in range(count)]).to_pylist()


def shelf(*piles: int) -> stored.Shelf:
    """One prompt `p` with so many completions in each file: `0/0`, `0/1`, ..., `1/0`, ..."""
    held = [[f"{place}/{n}" for n in range(size)] for place, size in enumerate(piles)]
    return stored.Shelf([Path(f"{place}") for place in range(len(piles))], {"p": held})


def at(index: int) -> Group:
    return Group(f"g{index}", "p", index)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 30))
def test_groups_are_balanced_over_the_files_as_far_as_they_go(piles: list[int], count: int, index: int) -> None:
    """No file could give one more without giving two more than another that still has some."""
    if sum(piles) < count:
        return
    taken = stored.take(shelf(*piles), at(index), count, seed=1, round=2)
    assert len(set(taken)) == count
    given_by = Counter(int(name.split("/")[0]) for name in taken)
    most = max(given_by.values())
    assert all(given_by[place] >= min(size, most - 1) for place, size in enumerate(piles))


def test_two_files_and_a_group_of_two_are_one_of_each_and_either_begins() -> None:
    firsts = []
    for index in range(60):
        taken = stored.take(shelf(3, 3), at(index), 2, seed=0, round=0)
        assert {name.split("/")[0] for name in taken} == {"0", "1"}
        firsts.append(taken[0].split("/")[0])
    assert 15 < firsts.count("0") < 45


def test_what_is_taken_is_a_hash_of_seed_round_and_place() -> None:
    def drawn(**at_: int) -> list[str]:
        where = {"seed": 0, "round": 0, **at_}
        return [name for index in range(20) for name in stored.take(shelf(4, 4), at(index), 2, **where)]

    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)
    assert drawn() != drawn(round=1)
    turned = shelf(4, 4)
    turned.completions["p"][0].reverse()
    assert stored.take(turned, at(0), 2, seed=0, round=0) == stored.take(shelf(4, 4), at(0), 2, seed=0, round=0)
    share = Counter(drawn(round=2) + drawn(round=3) + drawn(round=4))
    assert len(share) == 8, "every completion gets its turn"


def test_a_row_is_the_stored_one_under_this_rounds_ids(tmp_path: Path) -> None:
    one = write(tmp_path / "a.parquet", [row("a", "1+1=", "2"), row("other", "2+2=", "4")])
    two = write(tmp_path / "b.parquet", [row("b", "1+1=", "3", source="teacher", prompt_tokens=[])])
    made = sorted(rows_of([one, two]), key=lambda r: r["parent_id"])
    assert [r["parent_id"] for r in made] == ["a", "b"]
    assert sorted(r["rollout_id"] for r in made) == ["key-00000-0000", "key-00000-0001"]
    assert {r["group_id"] for r in made} == {"key-00000"}
    assert [r["source"] for r in made] == ["offline", "teacher"], "what another policy wrote is not this run's own"
    for r in made:
        assert (r["round"], r["pass"], r["policy"], r["policy_round"], r["engine"]) == (5, 0, "mu", 3, "transformers")
        assert r["prompt_tokens"] == ids("1+1=")
        assert r["logprobs"] == [-0.25] * len(r["tokens"])
    assert made[0]["tokens"] == [*ids("2"), EOS]


def test_text_alone_is_tokenised_once_with_its_end_and_log_probs_are_unknown(tmp_path: Path) -> None:
    bare = {"tokens": [], "logprobs": [], "train_mask": [], "prompt_tokens": [], "source": "offline"}
    file = write(
        tmp_path / "a.parquet",
        [row("done", "1+1=", "2", **bare), row("cut", "1+1=", "12", finish="length", **bare)],
    )
    made = {r["parent_id"]: r for r in rows_of([file])}
    assert made["done"]["tokens"] == [*ids("2"), EOS]
    assert made["cut"]["tokens"] == ids("12"), "a limit ended it, not the policy"
    for r in made.values():
        assert r["length"] == len(r["tokens"]) == len(r["train_mask"]) == r["segments"][0]["end"]
        assert all(r["train_mask"])
        assert all(math.isnan(x) for x in r["logprobs"])


def test_stored_ids_are_never_tokenised_again(tmp_path: Path) -> None:
    """The text of these ids would be other ids: a token inside that no text spells, and two ends."""
    odd = [ids("2")[0], TOKENIZER.unk_token_id, EOS, EOS]
    file = write(tmp_path / "a.parquet", [row("a", "1+1=", "2", tokens=odd), row("b", "1+1=", "2", tokens=odd)])
    assert [r["tokens"] for r in rows_of([file])] == [odd, odd]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt_tokens": ids("1+2=")}, "not the 4 of the task's prompt under this policy"),
        ({"tokens": [*ids("2"), 999]}, "token 999 is beyond the policy's vocabulary"),
        ({"text": "1" * 95, "tokens": ids("1" * 95)}, "have 99 tokens, the policy's context is 96"),
        ({"tokens": [], "text": "zzz", "logprobs": [], "train_mask": []}, "does not know all of its text 'zzz'"),
        ({"tokens": [], "text": "", "finish": "length", "logprobs": [], "train_mask": []}, "empty and cut off"),
        ({"tokens": ids("98")}, "do not spell their text in the policy's tokenizer"),
    ],
)
def test_rows_that_cannot_be_this_policys_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    file = write(tmp_path / "a.parquet", [row(name, "1+1=", **{"text": "2", **changes}) for name in "ab"])
    with pytest.raises(RollwayError, match=says):
        rows_of([file])


def test_files_that_are_none_of_rollouts_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", [row("a", "1+1=", "2")])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    prompts = tmp_path / "prompts.parquet"
    fields = {"prompt_id": "p", "task": "t", "split": "train", "messages": "[]", "meta": "{}"}
    parquet.write(prompts, pa.table({name: [value] for name, value in fields.items()}), "prompts")
    again = tmp_path / "again.parquet"
    again.write_bytes(whole.read_bytes())
    for files, says in (
        ([tmp_path / "none.parquet"], "no such file"),
        ([cut], "cut.parquet: not a whole Parquet file"),
        ([prompts], "holds the table 'prompts', not rollouts"),
        ([whole, again], "rollout a stands in .*whole.parquet already"),
    ):
        with pytest.raises(RollwayError, match=says):
            stored.shelve(files)


def test_prompts_need_a_whole_group() -> None:
    held = stored.Shelf([Path("a"), Path("b")], {"one": [["x"], []], "two": [["y"], ["z"]], "left": [["u", "v"], []]})
    assert stored.with_enough(held, ["one", "two", "left", "none"], 2) == ["two", "left"]
    assert stored.lopsided(held, ["two", "left"], 2) == 1
    with pytest.raises(RollwayError, match="none with 3 completions"):
        stored.with_enough(held, ["one", "two"], 3)
    with pytest.raises(RollwayError, match="none of the 3 prompts in them is a train prompt of the task"):
        stored.with_enough(held, ["none"], 1)


STORED = {"kind": "stored", "files": ["a.parquet"]}


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"passes": 2, "refill": {}}, "rollout.refill: has no effect on stored completions"),
        ({"entropy": True}, "rollout.entropy: has no effect"),
        ({"sampling": {"top_k": 4}}, "rollout.sampling.top_k: has no effect"),
        ({"engine": {"kind": "stored", "files": ["a", "a"]}}, "names a twice"),
        ({"engine": {"kind": "stored", "files": []}}, "files"),
    ],
)
def test_settings_without_effect_are_refused(rollout: dict[str, Any], says: str) -> None:
    over = {"rollout": {"engine": STORED, **rollout}, "train": {"objective": {"correction": "tis"}}}
    with pytest.raises(ConfigError, match=says):
        load_recipe("grpo", over)


def test_stored_completions_answer_no_other_prompt() -> None:
    with pytest.raises(RollwayError, match="answers no others"):
        make(StoredEngine(files=["a.parquet"]))
