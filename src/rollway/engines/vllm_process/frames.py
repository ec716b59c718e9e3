"""Messages between the stages and the vLLM process: a length prefix, JSON, then the arrays that the JSON declares.

No pickle: what arrives is numbers and text. Standard library only, since both environments import this file.
"""

from __future__ import annotations

import json
import socket
import struct
from array import array
from typing import Any

VERSION = 2
"""Raised with every change of a message: an engine of another version is ended and a new one started."""
_HEAD = struct.Struct("!4sIQ")
"""Magic, bytes of JSON, bytes of arrays."""
_MAGIC = b"rwVL"
_TYPES = "ifqB"
"""Codes of `array` that may travel: int32, float32, int64, bytes."""
_JSON_LIMIT = 1 << 28
_ARRAYS_LIMIT = 1 << 34


def send(connection: socket.socket, message: dict[str, Any], arrays: dict[str, array[Any]] | None = None) -> None:
    """Writes one message. Raises OSError when the other end is gone."""
    arrays = arrays or {}
    declared = [[name, values.typecode, len(values)] for name, values in arrays.items()]
    text = json.dumps({**message, "arrays": declared}).encode()
    size = sum(len(values) * values.itemsize for values in arrays.values())
    connection.sendall(_HEAD.pack(_MAGIC, len(text), size) + text)
    for values in arrays.values():
        connection.sendall(memoryview(values).cast("B") if len(values) else b"")


def receive(connection: socket.socket) -> tuple[dict[str, Any], dict[str, array[Any]]] | None:
    """The next message and its arrays; None when the other end has closed.

    Raises ValueError when what comes is no such message, OSError (TimeoutError too) from the socket.
    """
    head = _exactly(connection, _HEAD.size)
    if head is None:
        return None
    magic, text_size, arrays_size = _HEAD.unpack(head)
    if magic != _MAGIC or text_size > _JSON_LIMIT or arrays_size > _ARRAYS_LIMIT:
        raise ValueError("not a message of the vLLM engine")
    text = _exactly(connection, text_size)
    body = _exactly(connection, arrays_size)
    if text is None or body is None:
        return None
    message = json.loads(bytes(text))
    arrays: dict[str, array[Any]] = {}
    start = 0
    for name, code, count in message.pop("arrays"):
        if code not in _TYPES:
            raise ValueError(f"array {name} has type {code!r}")
        values = array(code)
        end = start + count * values.itemsize
        if count < 0 or end > len(body):
            raise ValueError(f"array {name} is longer than its message")
        values.frombytes(bytes(body[start:end]))
        arrays[name], start = values, end
    if start != len(body):
        raise ValueError("the message is longer than its arrays")
    return message, arrays


def pack(rows: list[list[int]]) -> tuple[array[int], array[int]]:
    """Rows of token ids as one array and the length of each."""
    flat = array("i")
    for row in rows:
        flat.extend(row)
    return flat, array("q", [len(row) for row in rows])


def unpack(flat: array[Any], lengths: array[int]) -> list[list[Any]]:
    """The inverse of `pack`, for any type. Raises ValueError when lengths and values do not fit."""
    rows, start = [], 0
    for length in lengths:
        rows.append(flat[start : start + length].tolist())
        start += length
    if start != len(flat) or any(length < 0 for length in lengths):
        raise ValueError("lengths and values do not fit")
    return rows


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end has closed. Between a request and its answer nothing else may be sent."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        try:
            count = connection.recv_into(view[got:])
        except ConnectionError:
            return None
        if not count:
            return None
        got += count
    return data
