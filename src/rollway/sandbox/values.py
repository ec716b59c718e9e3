"""Plain data as JSON text, and back: what may pass between a program and its tests.

A value that comes out of `decode` is made of Python's own types, whatever class it had in the program: a program cannot
hand its tests an object that says it equals everything. What is no plain data passes as a reference (`Remote`).
"""

import json
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

DEPTH = 60
"""Levels of nesting that pass."""
ITEMS = 1_000_000
"""Items of an iterator that pass."""
_EXACT = 2**53

Refer = Callable[[object], int]
"""Keeps an object that is no plain data, and says its number. Raises ValueError where none may pass."""


def dumps(value: object, refer: Refer) -> bytes:
    """Raises ValueError for what cannot be carried: too deep, too many items, or refused by `refer`."""
    return json.dumps(_encode(value, refer, DEPTH)).encode()


def _encode(value: Any, refer: Refer, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"a value is nested more than {DEPTH} levels deep")

    def each(items: Any) -> list[Any]:
        found = [_encode(item, refer, depth - 1) for item in islice(items, ITEMS + 1)]
        if len(found) > ITEMS:
            raise ValueError(f"a value has more than {ITEMS} items")
        return found

    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -_EXACT < value < _EXACT else {"int": hex(int(value))}
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case bytes() | bytearray():
            return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
        case type() if (name := _type_name(value)) is not None:
            return {"type": name}
        case complex():
            return {"complex": [value.real, value.imag]}
        case list():
            return each(list.__iter__(value))
        case tuple():
            return {"tuple": each(tuple.__iter__(value))}
        case dict():
            return {"dict": each(dict.items(value))}
        case set():
            return {"set": each(set.__iter__(value))}
        case frozenset():
            return {"frozenset": each(frozenset.__iter__(value))}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case deque():
            return {"deque": [each(value), value.maxlen]}
        case Fraction():
            return {"fraction": str(value)}
        case Decimal():
            return {"decimal": str(value)}
        case KeysView() | ItemsView() | ValuesView():
            kind = "keys" if isinstance(value, KeysView) else "values" if isinstance(value, ValuesView) else "items"
            return {kind: each(value)}
        case Iterator():
            return {"iterator": each(value)}
    if type(value).__module__ == "numpy" and callable(getattr(value, "tolist", None)):
        return _encode(value.tolist(), refer, depth - 1)
    return {"remote": refer(value)}


def _type_name(value: object) -> str | None:
    # By identity: a class may say that it equals every other.
    return next((name for name, kind in _TYPES.items() if kind is value), None)


def loads(text: bytes, meet: Callable[[int], object]) -> Any:
    """The value of `dumps`. `meet` makes what stands for a reference. Raises ValueError for any other text."""
    try:
        return _decode(json.loads(text), meet)
    except (TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"not a value: {type(error).__name__}") from None


def _decode(value: Any, meet: Callable[[int], object]) -> Any:
    if isinstance(value, list):
        return [_decode(item, meet) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, body)] = value.items()
    if kind == "remote":
        return meet(int(body))
    if kind == "int":
        return int(body, 16)
    if kind == "deque":
        items, most = body
        return deque(_decode(items, meet), most)
    return _MAKE[kind](_decode(body, meet))


_TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))}
"""Types of Python's own that are data too: tests say `int`."""


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(items)


_MAKE: dict[str, Callable[[Any], Any]] = {
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "tuple": tuple,
    "dict": _pairs,
    "set": set,
    "frozenset": frozenset,
    "range": lambda parts: range(*parts),
    "fraction": Fraction,
    "decimal": Decimal,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "items": lambda items: dict(items).items(),
    "iterator": iter,
    "type": _TYPES.__getitem__,
}
