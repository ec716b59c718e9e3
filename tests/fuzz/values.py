"""Inputs for fuzzing: trees as YAML and JSON have them, and small injuries to texts, bytes and trees that are whole."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.sampled_from(
        ["", "none", "exact", "huggingface", "sql", "0", "../..", "regex:(", "{", "{x", "a" * 300, 10**400]
    )
)


def trees(keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nested mappings and lists of scalars."""
    return st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=25
    )


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places in a tree, the root left out."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@st.composite
def injured_tree(draw: st.DrawFn, whole: Any, names: list[str]) -> Any:
    """A tree after one to three injuries: a value lost, replaced, wrapped, moved, or its key misspelt."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(tree))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        parent = tree
        for key in above:
            parent = parent[key]
        match draw(st.sampled_from(["lose", "replace", "wrap", "rename", "move", "tree"])):
            case "lose":
                del parent[last]
            case "replace":
                parent[last] = draw(SCALARS)
            case "wrap":
                parent[last] = draw(st.sampled_from([[parent[last]], {"kind": parent[last]}, {"x": parent[last]}]))
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(names) | st.text(max_size=8))] = parent.pop(last)
            case "move" if isinstance(parent, dict):
                other = draw(st.sampled_from(places))
                found = tree
                for key in other:
                    found = found[key] if isinstance(found, dict | list) and key in _keys(found) else None
                parent[last] = copy.deepcopy(found)
            case "tree":
                parent[last] = draw(trees(st.sampled_from(names)))
    return tree


def _keys(tree: Any) -> Any:
    return tree if isinstance(tree, dict) else range(len(tree))


@st.composite
def injured_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes after one to four injuries: cut, flipped, doubled, or filled in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "flip", "double", "insert", "zero"])):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=8))
            case "zero":
                count = min(draw(st.integers(1, 16)), len(data) - at)
                data[at : at + count] = bytes(count)
    return bytes(data)


@st.composite
def injured_text(draw: st.DrawFn, whole: str, pieces: list[str]) -> str:
    """A text after one to three injuries: a stretch lost, doubled, or replaced by one of the pieces."""
    text = whole
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["lose", "double", "piece", "text"])):
            case "lose":
                text = text[:at] + text[end:]
            case "double":
                text = text[:end] + text[at:end] + text[end:]
            case "piece":
                text = text[:at] + draw(st.sampled_from(pieces)) + text[end:]
            case _:
                text = text[:at] + draw(st.text(max_size=4)) + text[end:]
    return text


def joined(pieces: list[str], most: int = 30) -> st.SearchStrategy[str]:
    """Texts made of these pieces and of others."""
    return st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=most).map("".join)
