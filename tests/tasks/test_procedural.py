import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollway.config.tasks import TaskConfig
from rollway.errors import RollwayError
from rollway.tasks import prepare
from rollway.tasks.procedural import from_json, to_json
from rollway.tasks.verifiers import Verifiers

SPELL = {
    "source": {
        "kind": "reasoning_gym",
        "dataset": "spell_backward",
        "size": 60,
        "params": {"min_word_len": 3, "max_word_len": 6},
    },
    "prompt": "{metadata.word|lower}->",
    "answer": "{answer|lower}",
    "splits": {"heldout": 10},
}

atoms = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(atoms, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_entries_survive_json_with_their_types(value):
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert again == value
    assert type(again) is type(value)


def test_spell_backward_is_seeded_short_and_verified():
    done = prepare("spell", TaskConfig(**SPELL), Path())
    assert done == prepare("spell", TaskConfig(**SPELL), Path())
    other = {**SPELL, "source": {**SPELL["source"], "seed": 1000}}
    assert done.train != prepare("spell", TaskConfig(**other), Path()).train
    verifiers = Verifiers()
    for row in done.train.to_pylist():
        word = json.loads(row["messages"])[0]["content"].removesuffix("->")
        meta = json.loads(row["meta"])
        assert row["answer"] == word[::-1]
        assert verifiers.score(row["answer"], meta) == 1.0
        assert verifiers.score(None, meta) == 0.0
        assert 3 <= len(word) <= 6


@pytest.mark.parametrize("dataset", ["rearc", "chain_sum", "countdown", "rubiks_cube", "circuit_logic"])
def test_verifiers_say_the_same_after_storage(dataset):
    import reasoning_gym

    data = reasoning_gym.create_dataset(dataset, size=2, seed=3)
    source = {"kind": "reasoning_gym", "dataset": dataset, "size": 2, "seed": 3}
    config = TaskConfig(source=source, prompt="{question}", answer=None, splits={"heldout": 1})
    done = prepare("t", config, Path())
    metas = [json.loads(row["meta"]) for row in [*done.train.to_pylist(), *done.heldout.to_pylist()]]
    by_question = {meta["entry"]["question"]: meta for meta in metas}
    for index in range(2):
        entry = data[index]
        for answer in (entry["answer"], "nonsense", None):
            expected = data.score_answer(answer, entry)
            assert Verifiers().score(answer, by_question[entry["question"]]) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"dataset": "spell_backwards"}, ["spell_backward"]),
        ({"dataset": "spell_backward", "params": {"min_len": 3}}, ["min_len", "min_word_len"]),
        ({"dataset": "spell_backward", "params": {"min_word_len": 9, "max_word_len": 3}}, ["max_word_len must be"]),
    ],
)
def test_mistakes_are_named(source, words):
    with pytest.raises(RollwayError) as caught:
        prepare("t", TaskConfig(source={"kind": "reasoning_gym", **source}), Path())
    assert all(word in str(caught.value) for word in words)
