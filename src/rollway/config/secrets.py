"""Keys and passwords do not belong in a config: it is copied into results, logs, the report and MLflow."""

import os
import re
from collections.abc import Iterator
from typing import Any

from rollway.config.base import ConfigError

_SHAPES = {
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|\b(?:gsk|r8|dop_v1)_[A-Za-z0-9]{30,}|\b(?:xai|nvapi)-[A-Za-z0-9_-]{30,}"
    r"|\bGOCSPX-[A-Za-z0-9_-]{20,}|\bwhsec_[A-Za-z0-9+/=]{20,}|\bpplx-[A-Za-z0-9]{30,}"
    r"|\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|\blocal-[0-9a-f]{40}\b",
    "an access token": r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\."
    r"|\bpypi-[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}|\bya29\.[A-Za-z0-9_-]{20,}"
    r"|(?i:\bauthorization\s*[:=]\s*(?:basic|bearer|digest|token)\s+\S{8,})",
    "an address that is a secret": r"(?i:hooks\.slack\.com/(?:services|workflows)/\w"
    r"|discord(?:app)?\.com/api/webhooks/\w)",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    # A port is no password: http://host:8000/a@b. Nor is the user of ssh://git@host a token.
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:(?![0-9]+(?:[/?#\s]|$))[^\s@]+@",
    "a token in a URL": r"\bhttps?://[^/\s@?#:]{8,}@|\b[a-z][a-z0-9+.-]*://[^/\s@?#:]{20,}@",
}
_BEARER = re.compile(r"\bbearer\s+([A-Za-z0-9+/=._~-]{16,})", re.IGNORECASE)
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_SHORT_PIECES = 4.5
"""Characters, on average, of words and numbers that somebody wrote: `certificate2024-issue` has 6.7, what is drawn at
random 2 or 3."""
_LONG_PIECE = 9
"""Digits of a number that is no date."""
_SECRET_NAME = re.compile(
    r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|(?<!ASK)PASS|_PWD|PASSPHRASE|CREDENTIALS?|(?:^|_)AUTH|WEBHOOK(?:_URL)?)S?(?:_?\d+)?$",
    re.IGNORECASE,
)
_DEEPEST = 60
_SHORTEST = 8
"""Characters of an environment variable's value that are no accident in a config."""

_KEY_WORDS = "api|access|account|auth|client|encryption|secret|service|shared|signing|subscription|private|master"
_TOKEN_WORDS = (
    "access|api|app|auth|bearer|bot|csrf|deploy|git|github|gitlab|hf|hub|id|jwt|oauth|personal|private|refresh|sas|"
    "secret|security|session|slack|wandb"
)
_ALWAYS = re.compile(
    rf"(?:^|_)(?:password|passwd|passphrase|pwd|(?:{_KEY_WORDS})_?key|secret|(?:{_TOKEN_WORDS})_token"
    r"|authorization)s?$|^pass$|_pass$"
)
"""Names under which a text that is not empty is a secret. A tokenizer's pad_token, a sort_key or max_tokens is none."""
_PASSES = re.compile(r"(?:^|_)(?:pass|tokens)$")
"""Of these, those under which a number counts something."""
_LONG_NUMBER = 6
"""Characters of a number that may be a secret by its name."""
_NAMED = (["tasks"], ["warmups"], ["runs"], ["reward_models"])
"""Keys of a config whose own keys are names that people choose, as those of `score.scorers` are."""
_OFTEN = re.compile(r"(?:^|_)(?:auth|bearer|credentials?|cookies?|webhook(?:_url)?)$|^token$")
"""Names under which a long text without a gap is one."""
_IN_QUERIES = re.compile(r"^(?:key|token|auth|sig|signature|x_amz_(?:signature|credential|security_token))$")
_QUERY = re.compile(r"[?&;]([A-Za-z][A-Za-z0-9_.-]*)=[^&;#\s]+")


def refuse_secrets(mapping: Any, place: str) -> None:
    """Raises ConfigError, which names the key and not the value, where a text looks like a secret, stands under a name
    of secrets (`api_key`, also in the query of a URL), or holds the value of an environment variable whose name says
    that it is one (HF_TOKEN, OPENAI_API_KEY)."""
    held = {v: n for n, v in os.environ.items() if _SECRET_NAME.search(n) and len(v) >= _SHORTEST}
    for key, held_there, is_key in _texts(mapping, "", place):
        text = str(held_there)
        what = next((what for what, shape in _SHAPES.items() if re.search(shape, text)), None)
        what = what or ("an access token" if any(map(_is_drawn, _BEARER.findall(text))) else None)
        what = what or next((f"the value of {name}" for value, name in held.items() if value in text), None)
        what = what or (_by_name(key, text, is_key) if isinstance(held_there, str) else _number(key, text))
        if what is not None:
            raise ConfigError(
                f"{place}: `{key}` holds {what}, and configs are copied into results and logs; leave it in the "
                "environment (a judge's `key_env` names its variable, a python scorer reads os.environ, MLflow reads "
                "MLFLOW_TRACKING_URI, _USERNAME, _PASSWORD and _TOKEN)"
            )


def _is_drawn(text: str) -> bool:
    """Whether a text is one that nobody would write."""
    pieces = _PIECE.findall(text)
    numbers = [len(piece) for piece in pieces if piece.isdigit()]
    short = len("".join(pieces)) < _SHORT_PIECES * len(pieces)
    return bool(numbers) and (short or max(numbers) >= _LONG_PIECE)


def _names(key: str, is_key: bool) -> list[str]:
    """Names that say what a text under `key` is: not that of a task, a run or a scorer; but a text in place of one is
    none. is_key: the text is a key of the mapping there."""
    parts = key.split(".")
    last = len(parts) if is_key else len(parts) - 1
    chosen = {n for n in range(1, last) if parts[:n] in _NAMED or parts[:n][-2:] == ["score", "scorers"]}
    return [_plain(name) for n, name in enumerate(parts) if n not in chosen and not name.isdigit()]


def _number(key: str, text: str) -> str | None:
    """What a number is by the name that it stands under; a scorer's weight in the reward stands under the scorer's."""
    if key.split(".")[-3:-1] == ["score", "reward"]:
        return None
    named = any(_ALWAYS.search(name) and not _PASSES.search(name) for name in _names(key, False))
    return "what its name says is a secret" if named and len(text) >= _LONG_NUMBER else None


def _by_name(key: str, text: str, is_key: bool) -> str | None:
    """What a text is by the name that it stands under, or by a name in the query of a URL in it."""
    names = _names(key, is_key)
    if text.strip() and any(_ALWAYS.search(name) for name in names):
        return "what its name says is a secret"
    if names and _OFTEN.search(names[-1]) and len(text) >= _SHORTEST and not re.search(r"\s|^<.*>$", text):
        return "what its name says is a secret"
    if "://" in text:
        for name in map(_plain, _QUERY.findall(text)):
            if _ALWAYS.search(name) or _OFTEN.search(name) or _IN_QUERIES.search(name):
                return f"a URL with a secret in its query ({name})"
    return None


def _plain(name: str) -> str:
    """apiKey, api-key and API_KEY as api_key."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()


def _texts(value: Any, key: str, place: str, depth: int = 0) -> Iterator[tuple[str, str | float, bool]]:
    """Every text and number in a tree of mappings and lists, with its dotted key; keys of mappings are texts too,
    under the key of the mapping, and said to be keys.

    Raises ConfigError where the tree has no end: an alias of YAML can hold itself.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{place}: `{key[:60]}...` is nested too deeply, or an alias holds itself")
    match value:
        case bool():
            return
        case str() | int() | float():
            yield key, value, False
        case dict():
            for name, inner in value.items():
                yield key or "a key", str(name), True
                yield from _texts(inner, f"{key}.{name}".strip("."), place, depth + 1)
        case list() | tuple():
            for number, inner in enumerate(value):
                yield from _texts(inner, f"{key}.{number}".strip("."), place, depth + 1)
