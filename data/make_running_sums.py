"""Makes running_sums.jsonl: `python data/make_running_sums.py > data/running_sums.jsonl`.

A prompt is 6 digits; the working is the last digit of their sum so far, digit by digit; the answer is the last two
digits of the working. A verifier sees the answer alone, so a wrong working may be right by luck, in one of a hundred
cases.
"""

import json
import random
from itertools import accumulate


def entry(digits: list[int]) -> dict[str, str]:
    working = "".join(str(total % 10) for total in accumulate(digits))
    return {"prompt": f"{''.join(map(str, digits))}=", "working": working, "answer": working[-2:]}


def main() -> None:
    draw = random.Random(20261129)
    seen: set[tuple[int, ...]] = set()
    while len(seen) < 4000:
        seen.add(tuple(draw.randrange(10) for _ in range(6)))
    for digits in sorted(seen):
        print(json.dumps(entry(list(digits))))


if __name__ == "__main__":
    main()
