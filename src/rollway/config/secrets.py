"""Keys and passwords do not belong in a config: it is copied into results, logs, the report and MLflow."""

import os
import re
from collections.abc import Iterator
from typing import Any

from rollway.config.base import ConfigError

_SHAPES = {
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an access token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@",
}
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_DEEPEST = 60
_SHORTEST = 8
"""Characters of an environment variable's value that are no accident in a config."""


def refuse_secrets(mapping: Any, place: str) -> None:
    """Raises ConfigError, which names the key and not the value, where a text looks like a secret, or holds the value
    of an environment variable whose name says that it is one (HF_TOKEN, OPENAI_API_KEY)."""
    held = {v: n for n, v in os.environ.items() if _SECRET_NAME.search(n) and len(v) >= _SHORTEST}
    for key, text in _texts(mapping, "", place):
        what = next((what for what, shape in _SHAPES.items() if re.search(shape, text)), None)
        what = what or next((f"the value of {name}" for value, name in held.items() if value in text), None)
        if what is not None:
            raise ConfigError(
                f"{place}: `{key}` holds {what}, and configs are copied into results and logs; leave it in the "
                "environment (a judge's `key_env` names its variable, MLflow reads MLFLOW_TRACKING_URI, _USERNAME, "
                "_PASSWORD and _TOKEN)"
            )


def _texts(value: Any, key: str, place: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every text in a tree of mappings and lists, with its dotted key; keys of mappings are texts too.

    Raises ConfigError where the tree has no end: an alias of YAML can hold itself.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{place}: `{key[:60]}...` is nested too deeply, or an alias holds itself")
    match value:
        case str():
            yield key, value
        case dict():
            for name, inner in value.items():
                yield key or "a key", str(name)
                yield from _texts(inner, f"{key}.{name}".strip("."), place, depth + 1)
        case list() | tuple():
            for number, inner in enumerate(value):
                yield from _texts(inner, f"{key}.{number}".strip("."), place, depth + 1)
