"""How an answer is taken from a text: shared by tasks (reference answers) and scorers (completions)."""

from collections.abc import Callable

import regex

from rollway.errors import RollwayError

Extractor = Callable[[str], str | None]

SECONDS = 1.0
"""Most time one regular expression may take on one text."""

_BRACE = regex.compile(r"\\.|[{}]", regex.DOTALL)
"""A brace, or an escaped character, which is none."""
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
    marks = [mark.end() for mark in regex.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not marks:
        return None
    # One pass over all braces: a search from every mark would take the square of the length of a text full of them.
    boxes, opened, last = set(marks), [marks[0]], None
    for found in _BRACE.finditer(text, marks[0]):
        match found[0]:
            case "{":
                opened.append(found.end())
            case "}" if opened:
                start = opened.pop()
                if start in boxes and (last is None or start > last[0]):
                    last = (start, found.start())
    return None if last is None else text[last[0] : last[1]].strip()


def last_number(text: str) -> str | None:
    """The last number of the text, thousands separators removed; a minus counts unless it follows an operand (3-4)."""
    matches = _NUMBER.findall(text)
    return matches[-1].replace(",", "") if matches else None


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
