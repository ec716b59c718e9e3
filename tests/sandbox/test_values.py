"""Plain data survives the way between a program and its tests; nothing else comes through."""

import json
import math
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollway.sandbox import values

HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]))
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
PLAIN = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


def refuse(value):
    raise ValueError(type(value).__name__)


def there_and_back(value):
    return values.loads(values.dumps(value, refuse), refuse)


def same(one, other):
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    match one:
        case list() | tuple():
            return all(map(same, one, other))
        case dict():
            return list(map(type, one)) == list(map(type, other)) and all(map(same, one.values(), other.values()))
    return True


@settings(deadline=None)
@given(PLAIN)
def test_plain_data_comes_back_equal_and_of_the_same_types(value):
    assert same(value, there_and_back(value))


def test_not_a_number_and_infinity():
    back = there_and_back([math.nan, math.inf, -math.inf, -0.0])
    assert math.isnan(back[0]) and back[1:3] == [math.inf, -math.inf] and math.copysign(1, back[3]) == -1


def test_iterators_views_ranges_and_queues():
    assert list(there_and_back(x * x for x in range(4))) == [0, 1, 4, 9]
    assert there_and_back({1: 2}.keys()) == {1} and there_and_back({1: 2}.items()) == {(1, 2)}
    assert list(there_and_back({1: 2}.values())) == [2]
    assert there_and_back(range(3, 9, 2)) == range(3, 9, 2)
    back = there_and_back(deque([1, (2,)], 5))
    assert back == deque([1, (2,)]) and back.maxlen == 5
    assert there_and_back([int, dict, type(None)]) == [int, dict, type(None)]
    assert there_and_back(bytearray(b"ab")) == bytearray(b"ab") and there_and_back(2**70) == 2**70


def test_subclasses_lose_their_class():
    class Yes(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    point = namedtuple("point", "x y")
    back = there_and_back([Yes(4), Text("a"), point(1, 2), Counter("aab"), OrderedDict(a=1), True])
    assert [type(item) for item in back] == [int, str, tuple, dict, dict, bool]
    assert back == [4, "a", (1, 2), {"a": 2, "b": 1}, {"a": 1}, True] and back[0] != 5


def test_what_is_no_plain_data_is_kept_and_named_by_a_number():
    kept = []

    def refer(value):
        kept.append(value)
        return len(kept) - 1

    text = values.dumps([object(), {"f": len}], refer)
    assert values.loads(text, lambda number: ("met", number)) == [("met", 0), {"f": ("met", 1)}]
    assert kept[1] is len


@pytest.mark.parametrize("depth", [values.DEPTH, 10**5])
def test_deep_values_are_refused(depth):
    value = []
    for _ in range(depth):
        value = [value]
    with pytest.raises(ValueError, match="nested"):
        values.dumps(value, refuse)


def test_endless_iterators_are_refused():
    import itertools

    with pytest.raises(ValueError, match="items"):
        values.dumps(itertools.repeat(0), refuse)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*values._MAKE, "int", "deque", "remote", "other"]), inner, max_size=2)
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=1000)
@given(JSON)
def test_any_json_is_a_value_of_pythons_own_types_or_a_value_error(text):
    try:
        found = values.loads(json.dumps(text).encode(), lambda number: None)
    except ValueError:
        return
    own = (
        type,
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        list,
        tuple,
        dict,
        set,
        frozenset,
        range,
        deque,
        Fraction,
    )
    views = (type({}.keys()), type({}.values()), type({}.items()))
    assert found is None or type(found) in (*own, *views, Decimal) or type(found).__name__.endswith("iterator")


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_a_value_or_a_value_error(text):
    try:
        values.loads(text, lambda number: None)
    except ValueError:
        return


def test_deeply_nested_text_is_a_value_error():
    with pytest.raises(ValueError):
        values.loads(b"[" * 10**6 + b"]" * 10**6, lambda number: None)
