"""Templates over an entry's fields: `{field}`, `{metadata.word}`, `{word|lower}`; doubled braces are literal."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rollway.errors import RollwayError

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


def _without_think(text: str) -> str:
    """Without the spans between <think> and </think> and the white space around the rest."""
    return _THINKING.sub("", text).strip()


_FILTERS: dict[str, Callable[[str], str]] = {
    **{"lower": str.lower, "upper": str.upper, "strip": str.strip},
    "without_think": _without_think,
}
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Field:
    """One placeholder: keys from the entry inwards, and the filters applied to the text."""

    path: str
    filters: tuple[str, ...]


@lru_cache(maxsize=256)
def parse(template: str) -> tuple[str | Field, ...]:
    """Literal texts and fields of a template, in order.

    Raises RollwayError on single braces, empty names and unknown filters.
    """
    pieces: list[str | Field] = []
    end = 0
    for match in _PIECE.finditer(template):
        pieces.append(template[end : match.start()])
        end = match.end()
        match match.group():
            case "{{":
                pieces.append("{")
            case "}}":
                pieces.append("}")
            case "{" | "}":
                raise RollwayError(f"template {template!r}: single brace at {match.start()}; double it to mean a brace")
            case _:
                pieces.append(_field(template, match.group(1)))
    pieces.append(template[end:])
    return tuple(piece for piece in pieces if piece != "")


def render(template: str, entry: Mapping[str, Any], where: str) -> str | None:
    """The template filled with the entry's values; None where a value is null.

    Whole floats are written as integers (27.0 -> 27: JSON knows no difference), mappings and lists as JSON.
    Values are never searched for placeholders themselves. `where` names the entry in messages.
    Raises RollwayError naming a missing field and those that exist.
    """
    texts = []
    for piece in parse(template):
        if isinstance(piece, str):
            texts.append(piece)
            continue
        value = lookup(piece.path, entry, where)
        if value is None:
            return None
        text = as_text(value, piece.path, where)
        for name in piece.filters:
            text = _FILTERS[name](text)
        texts.append(text)
    return "".join(texts)


def lookup(path: str, entry: Mapping[str, Any], where: str) -> Any:
    """The value at `path`: the key of that whole name, else keys (and list indices) separated by dots."""
    if path in entry:
        return entry[path]
    value: Any = entry
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list | tuple) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise RollwayError(f"{where}: has no field {path!r}; there are {', '.join(_paths(entry)) or 'no fields'}")
    return value


def as_text(value: Any, path: str, where: str) -> str:
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case int() | float():
            return str(value)
        case dict() | list() | tuple():
            try:
                return json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise RollwayError(f"{where}: field {path!r} cannot be written as text ({error})") from None
        case _:
            raise RollwayError(f"{where}: field {path!r} is a {type(value).__name__}, which cannot be written as text")


def _field(template: str, inside: str) -> Field:
    path, *filters = (part.strip() for part in inside.split("|"))
    if not path:
        raise RollwayError(f"template {template!r}: a placeholder has no name; write {{field}}, or {{{{}}}} for braces")
    for name in filters:
        if name not in _FILTERS:
            raise RollwayError(f"template {template!r}: unknown filter {name!r}; there are {', '.join(_FILTERS)}")
    return Field(path, tuple(filters))


def _paths(entry: Mapping[str, Any]) -> list[str]:
    names = []
    for key, value in entry.items():
        names.append(str(key))
        if isinstance(value, Mapping):
            names.extend(f"{key}.{inner}" for inner in value)
    return names
