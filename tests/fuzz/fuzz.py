"""Fuzzing of whatever reads what others wrote: `python tests/fuzz/fuzz.py --examples 2000` (`make fuzz`).

Prints a table: inputs tried, taken, and refused in a sentence. The first input that ends otherwise is shrunk and shown,
and the exit code is 1.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # In place of this script's own folder, in which `fuzz` would be this file.
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.targets import TARGETS, Target


@dataclass(frozen=True)
class Count:
    tried: int
    taken: int
    seconds: float


def fuzz(target: Target, examples: int, start: int) -> Count:
    """Raises what the target raised on the smallest input found."""
    found: Counter[bool] = Counter()
    began = time.monotonic()

    # No database: nothing that an earlier session found decides what this one tries.
    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs())
    def one(value: Any) -> None:
        found[target.tried(value)] += 1

    one()
    return Count(found.total(), found[True], time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0, help="where the inputs begin")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[target.name for target in TARGETS])
    args = parser.parse_args()
    print("| target | what | tried | taken | refused in a sentence | seconds |\n|---|---|---|---|---|---|", flush=True)
    total, failed = 0, []
    for target in TARGETS:
        if args.only and target.name not in args.only:
            continue
        try:
            count = fuzz(target, args.examples, args.seed)
        except Exception:
            failed.append(target.name)
            print(f"| {target.name} | {target.meaning} | FAILED | | | |", flush=True)
            traceback.print_exc()
            continue
        total += count.tried
        cells = (f"{count.tried:,}", f"{count.taken:,}", f"{count.tried - count.taken:,}", f"{count.seconds:.0f}")
        print(f"| {target.name} | {target.meaning} | {' | '.join(cells)} |", flush=True)
    print(f"\n{total:,} inputs with seed {args.seed}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
