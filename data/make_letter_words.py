"""Makes the files letter_words*.jsonl and revised_words.jsonl: `python data/make_letter_words.py`.

Words of letters a to h and the same backwards, and what small policies are taught of them before methods that ask for a
second ability of the policy: to explain an answer that it was given, to read a hint, to revise its own answer.
"""

import json
import random
from itertools import product
from pathlib import Path

LETTERS = "abcdefgh"
PAIRS = [a + b for a, b in product(LETTERS, repeat=2)]


def words() -> list[dict[str, str]]:
    """All 64 words of two letters."""
    return [{"word": w, "answer": w[::-1]} for w in PAIRS]


def explained() -> list[dict[str, str]]:
    """Each word's own answer is taught wrong, with right steps; the steps to a given answer are taught right."""
    draw = random.Random(0)
    rows = []
    for a, b in PAIRS:
        wrong = draw.choice([w for w in PAIRS if w != b + a])
        rows.append({"prompt": f"{a}{b}>", "text": f"{b},{a}:{wrong}"})
        rows.append({"prompt": f"{a}{b}>{b}{a}?", "text": f"{b},{a}:{b}{a}"})
    return rows


def hinted(role: str) -> list[dict[str, str]]:
    """The teacher answers in the format and writes hints. The student answers words that begin with e to h only where
    it reads a hint, and else says anything."""
    draw = random.Random(role)
    rows = []
    for a, b in PAIRS:
        right = f"({b},{a})[{b}{a}]"
        if role == "teacher":
            rows += [{"prompt": f"{a}{b}>", "text": right}, {"prompt": f"{a}{b}>{b}{a}?", "text": f"*{b}*"}]
        else:
            anything = "".join(draw.choices(LETTERS, k=2))
            rows.append({"prompt": f"{a}{b}>", "text": right if a in "abcd" else anything})
            rows.append({"prompt": f"{a}{b}>{b}:{b}{a}!", "text": right})
    return rows


def revised() -> list[dict[str, str]]:
    """2,400 words of six letters. Three in ten demonstrations go on after a first answer: half of these begin with one
    wrong letter, `no` and the right answer, half with the right answer, `so` and the same again."""
    draw = random.Random(5)
    found: dict[str, None] = {}
    while len(found) < 2400:
        found["".join(draw.choice(LETTERS) for _ in range(6))] = None
    rows = []
    for word in found:
        right, kind = word[::-1], draw.random()
        demo = right
        if kind < 0.15:
            at = draw.randrange(6)
            wrong = draw.choice([letter for letter in LETTERS if letter != right[at]])
            demo = f"{right[:at]}{wrong}{right[at + 1 :]}>no>{right}"
        elif kind < 0.3:
            demo = f"{right}>so>{right}"
        rows.append({"word": word, "answer": right, "demo": demo})
    return rows


def files() -> dict[str, str]:
    """Text of every file by its name."""
    made = {
        "letter_words": words(),
        "letter_words_explained": explained(),
        "letter_words_student": hinted("student"),
        "letter_words_teacher": hinted("teacher"),
        "revised_words": revised(),
    }
    return {f"{name}.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows) for name, rows in made.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
