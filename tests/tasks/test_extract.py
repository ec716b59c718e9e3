import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollway.errors import RollwayError
from rollway.tasks.extract import after_hash, boxed, extractor, last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 5\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $-1,000.50 \nmore", "-1000.50"),
        ("#### 3\n#### 4", "4"),
        ("#### 1,2", "1,2"),
        ("no mark 7", None),
        ("####", None),
        ("#### \n", None),
    ],
)
def test_hash(text, answer):
    assert after_hash(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}} and text", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a}}", "a"),
        (r"\fbox{ 9 }", "9"),
        (r"\boxed{\boxed{3}}", "3"),
        ("boxed{7}", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 18.", "18"),
        ("1,234 dollars", "1234"),
        ("-5", "-5"),
        ("x = -5.25", "-5.25"),
        ("3-4", "4"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        (".5", ".5"),
        ("none", None),
    ],
)
def test_last_number(text, answer):
    assert last_number(text) == answer


def test_regex_takes_the_last_match_and_its_first_group():
    assert extractor(r"regex:<a>(.*?)</a>")("<a>1</a> <a>2</a>") == "2"
    assert extractor(r"regex:[a-z]+")("abc 12 def") == "def"
    assert extractor(r"regex:[a-z]+")("12") is None


def test_a_pattern_that_explodes_is_stopped():
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        extractor("regex:(a|aa)+$")("a" * 60 + "b")
    assert time.monotonic() - start < 20  # a busy machine


@pytest.mark.parametrize("spec", ["bxed", "regex:(", "regex"])
def test_unknown_specs_are_refused(spec):
    with pytest.raises(RollwayError, match="extract"):
        extractor(spec)


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc xyz.\n"))
def test_integers_survive_grouping(number, prefix):
    text = f"{prefix} {number:,}"
    assert last_number(text) == str(number)
    assert after_hash(f"{prefix}#### {number:,}") == str(number)


balanced = st.recursive(
    st.text(alphabet="ab1+ ", max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(lambda x: "{" + "".join(x) + "}"),
)


@given(balanced, st.text(alphabet="ab {}"))
def test_boxed_returns_any_balanced_content(content, prefix):
    assert boxed(f"{prefix}\\boxed{{{content}}}") == content.strip()


@given(st.text())
def test_nothing_raises_on_any_text(text):
    for spec in ("none", "hash", "boxed", "last_number"):
        found = extractor(spec)(text)
        assert found is None or isinstance(found, str)
    number = last_number(text)
    assert number is None or re.fullmatch(r"-?[0-9]*\.?[0-9]+", number)
