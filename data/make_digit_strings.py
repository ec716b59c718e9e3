"""Makes digit_strings.jsonl: `python data/make_digit_strings.py > data/digit_strings.jsonl`.

A prompt is a letter and 3 to 7 digits; the answer has as many digits, each of which can be judged on its own:
r writes them backwards, m the largest so far, o all of them in order.
"""

import json
import random
from itertools import accumulate

OPERATIONS = {
    "r": ("reverse", lambda digits: digits[::-1]),
    "m": ("maximum", lambda digits: list(accumulate(digits, max))),
    "o": ("order", sorted),
}


def entry(letter: str, digits: list[int]) -> dict[str, str]:
    domain, operation = OPERATIONS[letter]
    return {
        "prompt": f"{letter}{''.join(map(str, digits))}=",
        "answer": "".join(map(str, operation(digits))),
        "domain": domain,
    }


def main() -> None:
    draw = random.Random(20261125)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    while len(seen) < 6000:
        digits = tuple(draw.randrange(10) for _ in range(draw.randint(3, 7)))
        seen.add((draw.choice("rmo"), digits))
    for letter, digits in sorted(seen):
        print(json.dumps(entry(letter, list(digits))))


if __name__ == "__main__":
    main()
