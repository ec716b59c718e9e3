"""Short programs judged in the sandbox, against plain interpreters that contain nothing.

Every program is another text and passes its tests. Ours is what the `program` scorer does, boxes started anew; the peer
starts `python -I` for each program, with its tests in the same process or its input on standard input.
"""

import queue
import subprocess
import sys
import threading

import harness

from rollway.config.scorers import ProgramScorer
from rollway.scorers import Row, program

HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "test": "def check(candidate):\n" + "".join(f"    assert candidate({n}, 3) == {n + 3}\n" for n in range(8)),
    "entry_point": "add",
}
MBPP = {"test_list": [f"assert add({n}, 3) == {n + 3}" for n in range(3)]}
STDIO = {"tests": [{"input": "4 3\n", "output": "7\n"}]}
FUNCTION = "def add(a, b):\n    return a + b  # {}\n"
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)  # {}\n"
CASES = {"humaneval": (HUMANEVAL, FUNCTION), "mbpp": (MBPP, FUNCTION), "stdio": (STDIO, SCRIPT)}


def main() -> int:
    options = harness.parser(__doc__)
    options.add_argument("--programs", type=int, default=300, help="programs of each format")
    chosen = options.parse_args()
    results = []
    for kind, (meta, text) in CASES.items():
        texts = [text.format(n) for n in range(chosen.programs)]
        ours = lambda kind=kind, meta=meta, texts=texts: judged(kind, meta, texts, chosen.threads)  # noqa: E731
        peer = lambda kind=kind, meta=meta, texts=texts: uncontained(kind, meta, texts, chosen.threads)  # noqa: E731
        results.append(
            harness.race(
                "programs",
                f"{kind}, {chosen.programs} programs",
                ours,
                peer,
                peer_name="an interpreter each, uncontained",
                bar=None,
                repeats=chosen.repeats,
                note="start of the boxes included",
            )
        )
        each = [seconds / len(texts) for seconds in results[-1].ours]
        results.append(harness.Result("programs", f"{kind}, one program", each, [], "", harness.at_most(1 / 40)))
    return harness.finish(results, chosen)


def judged(kind: str, meta: dict, texts: list[str], threads: int) -> None:
    rows = [Row(str(n), "p", "g", n, text, 1, "stop", [], "t", [], None, meta) for n, text in enumerate(texts)]
    verdicts = program.verdicts("code", ProgramScorer(format=kind), rows, threads)
    assert all(verdict.reward == 1.0 for verdict in verdicts)


def uncontained(kind: str, meta: dict, texts: list[str], threads: int) -> None:
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for text in texts:
        todo.put(text)
    wrong: list[str] = []

    def serve() -> None:
        while not todo.empty():
            try:
                text = todo.get_nowait()
            except queue.Empty:
                return
            if not passes(kind, meta, text):
                wrong.append(text)

    workers = [threading.Thread(target=serve) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def passes(kind: str, meta: dict, text: str) -> bool:
    given, expected = "", ""
    match kind:
        case "humaneval":
            text = f"{meta['prompt']}\n{text}\n{meta['test']}\ncheck(add)\n"
        case "mbpp":
            text = "\n".join([text, *meta["test_list"]])
        case _:
            given, expected = meta["tests"][0]["input"], meta["tests"][0]["output"]
    done = subprocess.run([sys.executable, "-I", "-c", text], input=given, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout == expected


if __name__ == "__main__":
    raise SystemExit(main())
