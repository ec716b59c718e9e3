"""What makes two prompts the same: tasks and imports give the same prompt the same id."""

import hashlib
import json
import unicodedata
from typing import Any


def prompt_id(messages: list[dict[str, Any]]) -> str:
    """16 hex digits of a prompt, a list of {role, content}: the id of a prompt that brings none of its own."""
    return hash_of(normalised(messages))[:16]


def normalised(messages: list[dict[str, Any]]) -> str:
    """Text that is equal for prompts that differ only in Unicode form, line ends, trailing or outer white space."""
    parts = []
    for message in messages:
        text = unicodedata.normalize("NFC", message["content"]).replace("\r\n", "\n")
        parts.append([message["role"], "\n".join(line.rstrip() for line in text.split("\n")).strip()])
    return json.dumps(parts)


def hash_of(text: str) -> str:
    """sha256 in hex, also of text with half a surrogate pair."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
