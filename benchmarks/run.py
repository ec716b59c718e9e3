"""Runs the benches, each in a process of its own, records them and writes the table in docs/benchmarks.md.

python benchmarks/run.py            every bench of this machine
python benchmarks/run.py decode     some of them
python benchmarks/run.py --table    only the table, from what is recorded
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent

CPU: dict[str, list[list[str]]] = {
    "cli": [[]],
    "stage_start": [[]],
    "workflow_overhead": [[]],
    "decode": [[]],
    "train": [[]],
    "train_memory": [[]],
    "curation": [[], ["--rows", "10000000"]],
    "programs": [[]],
    "queries": [[]],
    "report_page": [[]],
    "rl_step": [[]],
    "rl_memory": [[]],
    "fork": [[]],
    "overlap": [[]],
}
"""Bench -> the arguments of each of its calls, which keep off a GPU."""

GPU: dict[str, list[list[str]]] = {
    name: [["--device", "cuda"]] for name in ("decode", "train", "train_memory", "rl_step")
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="BENCH", help=f"of {', '.join(CPU)}; none: all")
    options.add_argument("--table", action="store_true", help="write the table from what is recorded, run nothing")
    options.add_argument("--device", choices=("cpu", "cuda"), help="which set; default: cuda where there is a GPU")
    chosen = options.parse_args()
    if unknown := [name for name in chosen.names if name not in CPU]:
        options.error(f"no bench named {unknown[0]}; there are {', '.join(CPU)}")
    failed = [] if chosen.table else _run(chosen.names, chosen.device or _device())
    sys.path.insert(0, str(FOLDER))
    import table

    table.write()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(names: list[str], device: str) -> list[str]:
    """Returns the calls that failed; the others are recorded all the same."""
    failed = []
    for name, arguments in calls(names, device):
        print(f"== {' '.join([name, *arguments])}", flush=True)
        start = time.perf_counter()
        environment = os.environ | ({} if "cuda" in arguments else {"ROLLWAY_DEVICE": "cpu"})
        done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--record", *arguments], env=environment)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            failed.append(" ".join([name, *arguments]))
    return failed


def calls(names: list[str], device: str) -> list[tuple[str, list[str]]]:
    """Bench and arguments of each call: the set of `device`, or what is named, on the CPU where no GPU bench is of that
    name."""
    chosen = CPU | GPU if device == "cuda" and names else GPU if device == "cuda" else CPU
    return [(name, arguments) for name, each in chosen.items() if not names or name in names for arguments in each]


def _device() -> str:
    from rollway.runtime.device_lock import visible_devices

    return "cuda" if visible_devices() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
