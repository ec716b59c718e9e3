import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollway.errors import RollwayError
from rollway.template import render

ENTRY = {
    "question": "2+2?",
    "metadata": {"word": "Sun", "parts": ["a", {"b": 7}]},
    "a.b": "dotted",
    "number": 27.0,
    "half": 0.5,
    "yes": True,
    "none": None,
    "raw": b"x",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", "2+2?"),
        ("Q: {question}\nA:", "Q: 2+2?\nA:"),
        ("{metadata.word}->", "Sun->"),
        ("{metadata.word|lower}", "sun"),
        ("{ metadata.word | upper }", "SUN"),
        ("{metadata.parts.1.b}", "7"),
        ("{a.b}", "dotted"),
        ("{number} {half} {yes}", "27 0.5 true"),
        ("{metadata.parts}", '["a", {"b": 7}]'),
        ("\\boxed{{{number}}}", "\\boxed{27}"),
        ("{{}}", "{}"),
        ("", ""),
        ("{none}", None),
        ("x {none}", None),
    ],
)
def test_renders(template, text):
    assert render(template, ENTRY, "row 1") == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{qestion}", ["row 1", "'qestion'", "question", "metadata.word"]),
        ("{metadata.wrd}", ["'metadata.wrd'", "metadata.word"]),
        ("{question.__class__}", ["question.__class__"]),
        ("{metadata.parts.9}", ["metadata.parts.9"]),
        ("{question|shout}", ["shout", "lower"]),
        ("a { b", ["single brace"]),
        ("a } b", ["single brace"]),
        ("{}", ["no name"]),
        ("{raw}", ["bytes"]),
    ],
)
def test_mistakes_are_named(template, words):
    with pytest.raises(RollwayError) as caught:
        render(template, ENTRY, "row 1")
    assert all(word in str(caught.value) for word in words)


@given(st.text())
def test_values_are_never_searched_for_placeholders(value):
    assert render("<{x}>", {"x": value}, "row") == f"<{value}>"


@given(st.text())
def test_doubled_braces_give_any_literal(text):
    assert render(text.replace("{", "{{").replace("}", "}}"), {}, "row") == text


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1))
def test_mappings_are_json(value):
    assert json.loads(render("{x}", {"x": value}, "row")) == value
