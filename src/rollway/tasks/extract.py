"""How an answer is taken from a text: shared by tasks (reference answers) and scorers (completions)."""

from collections.abc import Callable

import regex

from rollway.errors import RollwayError

Extractor = Callable[[str], str | None]

SECONDS = 1.0
"""Most time one regular expression may take on one text."""

_THOUSANDS = regex.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NUMBER = regex.compile(
    r"(?:(?<![0-9A-Za-z_.)\]}])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def extractor(spec: str) -> Extractor:
    """The function that a spec names: none, hash, boxed, last_number, or regex:PATTERN (its first group, if any).

    Each maps a text to its last answer, or to None where there is none.
    """
    match spec:
        case "none":
            return _whole
        case "hash":
            return after_hash
        case "boxed":
            return boxed
        case "last_number":
            return last_number
        case _ if spec.startswith("regex:"):
            return _by_pattern(spec.removeprefix("regex:"))
        case _:
            raise RollwayError(f"extract: {spec!r} is none of none, hash, boxed, last_number, regex:PATTERN")


def after_hash(text: str) -> str | None:
    """What follows the last `####` on its line (GSM8K, arXiv 2110.14168), without thousands separators and $."""
    _, mark, tail = text.rpartition("####")
    answer = tail.strip().split("\n", 1)[0].strip().lstrip("$").strip()
    if not mark or not answer:
        return None
    return _THOUSANDS.sub("", answer)


def boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` or `\fbox{...}`, nested braces and escaped braces included."""
    last = None
    for mark in regex.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        end = _closing_brace(text, mark.end())
        if end is not None:
            last = text[mark.end() : end].strip()
    return last


def last_number(text: str) -> str | None:
    """The last number of the text, thousands separators removed; a minus counts unless it follows an operand (3-4)."""
    matches = _NUMBER.findall(text)
    return matches[-1].replace(",", "") if matches else None


def _closing_brace(text: str, start: int) -> int | None:
    depth, at = 1, start
    while at < len(text):
        match text[at]:
            case "\\":
                at += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
                if depth == 0:
                    return at
        at += 1
    return None


def _by_pattern(pattern: str) -> Extractor:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise RollwayError(f"extract: regex:{pattern} is not a regular expression ({error})") from None

    def extract(text: str) -> str | None:
        """Raises TimeoutError when the pattern backtracks for longer than SECONDS."""
        matches = list(compiled.finditer(text, timeout=SECONDS))
        return matches[-1].group(min(1, compiled.groups)) if matches else None

    return extract


def _whole(text: str) -> str | None:
    return text
