"""Programs judged by their tests: formats, what is read of completions, faults. Hostile ones are in tests/sandbox."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rollway.config.scorers import ProgramScorer
from rollway.errors import RollwayError
from rollway.sandbox import client
from rollway.scorers import program
from rollway.tasks import require_answers

ADD = {
    "prompt": 'from typing import List\n\ndef twice(n):\n    return 2 * n\n\ndef add(a, b):\n    """Their sum."""\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert add(1, 1) == twice(1)\n",
    "entry_point": "add",
}
GCD = {"test_list": ["assert gcd(12, 18) == 6", "assert gcd(7, 5) == 1"], "test_setup_code": ""}
SUMS = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9\n"}]}


@pytest.fixture
def judge(make_row):
    def judge(kind, meta, *completions, **settings):
        rows = [replace(make_row("", number=n, meta=meta), completion=text) for n, text in enumerate(completions)]
        return program.verdicts("code", ProgramScorer(format=kind, cpu=2, **settings), rows, 1)

    return judge


def rewards(verdicts):
    assert [v.error for v in verdicts] == [None] * len(verdicts)
    return [v.reward for v in verdicts]


def test_humaneval(judge):
    right = "Sure:\n```python\ndef add(a: int, b: int) -> List:\n    return twice(a) - a + b\n```\nThat is it."
    wrong = "```python\ndef add(a, b):\n    return a - b\n```"
    other_name = "```\ndef plus(a, b):\n    return a + b\n```"
    found = judge("humaneval", ADD, right, wrong, other_name)
    assert rewards(found) == [1.0, 0.0, 0.0]
    assert found[0].components == {"passed": 1.0}
    assert found[1].components == {"passed": 0.0}


def test_a_continuation_follows_its_prompt(judge):
    assert rewards(judge("humaneval", ADD, "    return a + b\n", "    return 0\n", code="continuation")) == [1.0, 0.0]


def test_mbpp_with_parts_and_all(judge):
    half = "def gcd(a, b):\n    return 6"
    right = "import math\ndef gcd(a, b):\n    return math.gcd(a, b)"
    assert rewards(judge("mbpp", GCD, half, right)) == [0.0, 1.0]
    assert rewards(judge("mbpp", GCD, half, right, partial=True)) == [0.5, 1.0]


def test_mbpp_functions_named_as_pythons_own_and_classes_of_the_program(judge):
    named = {"test_list": ["assert sum(10, 15) == 6"]}
    assert rewards(judge("mbpp", named, "def sum(a, b):\n    return 6")) == [1.0]
    pairs = {"test_list": ["assert longest([Pair(5, 24), Pair(39, 60)], 2) == 3"]}
    code = "class Pair:\n    def __init__(self, a, b):\n        self.a = a\ndef longest(pairs, n):\n    return n + 1"
    assert rewards(judge("mbpp", pairs, code)) == [1.0]


def test_names_of_the_library_are_the_librarys_unless_nothing_else_is_called(judge):
    meta = {"test_list": ["assert isclose(half(3), 1.5)", "assert reduce(mul, [half(4), pi]) > 6"]}
    code = "def half(n):\n    return n / {}\ndef isclose(a, b):\n    return True"
    assert rewards(judge("mbpp", meta, code.format(2), code.format(3))) == [1.0, 0.0]
    alone = {"test_list": ["assert gcd(12, 18) == 6"]}
    assert rewards(judge("mbpp", alone, "def gcd(a, b):\n    return 3")) == [0.0]
    starred = {"test_list": ["assert isclose(half(3), trunc(1.5))"], "test_setup_code": "from math import *"}
    assert rewards(judge("mbpp", starred, code.format(2))) == [0.0]


JUDGED = [
    ["assert same(f(1), 3)"],
    ["assert not same(f(1), 3)"],
    ["assert norm(f(1)) == norm(3)"],
    ["assert f(1) == g(2)"],
    ["x = f(1)\nassert same(x, 3)"],
    ["assert f(1) == 4", "y = norm(3)\nassert norm(4) == y"],
    ["assert isclose(gcd(1, 2), 1)"],
    ["assert gcd(lcm(2, 3), 6) == 6"],
    ["assert search(Node(1), 3) == True"],
    ["assert abs(pow(2, 3) - 8) < 1e-6"],
    ["assert round(sum([1, 2]), 1) == 3.0"],
    ["assert sorted(set([3, 1])) == [1, 3]"],
    ["assert set(sorted([3, 1])) == {1, 3}"],
    ["assert not abs(pow(2, 3) - 8)"],
    ["assert pow(2, 3) - abs(-8) == 0"],
    ["assert isinstance(sum([1, 2]), int)"],
]


@pytest.mark.parametrize("tests", JUDGED, ids=lambda tests: tests[-1])
def test_two_names_of_which_one_may_judge_the_other_need_an_entry_point(judge, tests):
    names = "same norm g isclose gcd lcm search Node abs round sorted set isinstance"
    cheat = f"def f(*a): return 0 if a[0] == 0 else 4\n{' = '.join(names.split())} = f"
    [verdict] = judge("mbpp", {"test_list": tests}, cheat)
    assert verdict.reward == 0.0 and "say in meta.entry_point" in verdict.error


def test_a_function_of_pythons_own_that_no_other_wraps_is_the_programs(judge):
    code = "def sum(items):\n    return items[0] + {}"
    for test in ["assert sum([1, 2]) == 3", "assert not sum([1, 2]) - 3", "assert sum(sum([[1], [0]])) == 3"]:
        wrong, right = (
            code.format("[]"),
            "def sum(items):\n    return 3 if 2 in items else [1, 2] if [1] in items else 0",
        )
        assert rewards(judge("mbpp", {"test_list": [test]}, right, wrong)) == [1.0, 0.0]
    helper = {"test_list": ["assert right(sum([1, 2]))"], "test_setup_code": "def right(n):\n    return n == 3"}
    assert rewards(judge("mbpp", helper, code.format(2), "def right(n): return True\ndef sum(n): return 4")) == [
        1.0,
        0.0,
    ]


def test_tests_that_call_nothing_of_the_program_say_nothing_of_it(judge):
    for test in ["assert [1, 2].count(1) == 1", "total = sum([1, 2])\nassert total == 3", "sum([1, 2])"]:
        [verdict] = judge("mbpp", {"test_list": [test]}, "def sum(items):\n    return 0")
        assert verdict.reward == 0.0 and "say in meta.entry_point" in verdict.error


def test_entry_points_say_whose_a_name_is(judge):
    code = "def gcd(a, b):\n    return 1.0\ndef isclose(a, b):\n    return False"
    meta = {"test_list": ["assert isclose(gcd(1, 2), 1)"], "entry_point": "gcd"}
    assert rewards(judge("mbpp", meta, code)) == [1.0]
    assert rewards(judge("mbpp", {**meta, "entry_point": ["gcd", "isclose"]}, code)) == [0.0]
    built = {"test_list": ["assert f(root)"], "test_setup_code": "root = Node(1)", "entry_point": ["f", "Node"]}
    assert rewards(judge("mbpp", built, "def Node(n):\n    return n\ndef f(n):\n    return n == 1")) == [1.0]


@pytest.mark.parametrize("value", ["'abc'.upper", "{len}", "range(3).index"])
def test_what_a_program_answers_makes_no_fault_of_its_tests(judge, value):
    meta = {"test_list": [f"assert f(f(1){'.upper' if 'abc' in value else '.index' if 'range' in value else ''}) == 2"]}
    code = f"def f(n):\n    return {value.partition('.')[0]}"
    assert rewards(judge("mbpp", meta, code)) == [0.0]


LONG = """
from {module} import {name}
class Long({name}):
    def __str__(self): return 'x' * 200_000
def f(x): return Long(1)
"""


@pytest.mark.parametrize(("module", "name"), [("fractions", "Fraction"), ("decimal", "Decimal")])
def test_an_answer_that_python_quotes_at_length_is_its_programs_failure(judge, module, name):
    """The report of the tests has room for 64 KiB; the programs beside it are judged as ever."""
    meta = {"test_list": ["assert f(1) == 2"]}
    found = judge("mbpp", meta, "def f(x): return 2", LONG.format(module=module, name=name), "def f(x): return x + 1")
    assert rewards(found) == [1.0, 0.0, 1.0]
    assert [one.error for one in found] == [None] * 3


def test_mbpp_setup(judge):
    meta = {"test_list": ["assert flat(Tree(3)) == 4"], "test_setup_code": "def Tree(n):\n    return [n]\n"}
    assert rewards(judge("mbpp", meta, "def flat(t):\n    return t[0] + 1")) == [1.0]
    meta = {"test_list": ["assert math.isclose(half(3), 1.5)"], "test_imports": ["import math"]}
    assert rewards(judge("mbpp", meta, "def half(n):\n    return n / 2")) == [1.0]


def test_setup_of_objects_of_the_program(judge):
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\n"
    meta = {"test_list": ["assert height(root) == 3", "assert root.left.value == 2"], "test_setup_code": setup}
    code = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def height(node):
    return 0 if node is None else 1 + height(node.left)
"""
    no_node = "def height(node):\n    return 3"
    number = "height = Node = lambda node: 3"
    found = judge("mbpp", meta, code, no_node, code.replace("self.value, ", "other, "), number)
    assert rewards(found) == [1.0, 0.0, 0.0, 0.0]
    assert found[1].components == {"passed": 0.0, "raised": 1.0}


def test_types_as_arguments_and_modules_that_tests_do_not_import(judge):
    meta = {"test_list": ["assert without((1, 'a', 2), int) == ['a']", "assert math.isclose(kind(1)(2), 2)"]}
    code = "def without(items, kind):\n    return [i for i in items if type(i) is not kind]\nkind = type"
    assert rewards(judge("mbpp", meta, code)) == [1.0]


def test_exceptions_of_the_program_reach_its_tests(judge):
    test = """
try:
    root(-1)
except ValueError as error:
    assert 'negative' in str(error)
else:
    assert False
"""
    raises = "def root(n):\n    raise {}('negative')"
    meta = {"test_list": [test]}
    own = "class Own(ValueError): pass\n" + raises.format("Own")
    found = rewards(judge("mbpp", meta, raises.format("ValueError"), raises.format("KeyError"), own, "root = abs"))
    assert found == [1.0, 0.0, 1.0, 0.0]


def test_an_index_error_is_one_unless_it_might_end_a_loop_of_the_tests(judge):
    test = "try:\n    second([1])\nexcept IndexError:\n    pass\nelse:\n    assert False"
    code = "def second(items):\n    return items[{}]"
    assert rewards(judge("mbpp", {"test_list": [test]}, code.format(1), code.format(0))) == [1.0, 0.0]


def test_stdio(judge):
    right = "a, b = map(int, input().split())\nprint(a + b)"
    spaces = "a, b = map(int, input().split())\nprint(a + b, end='  \\n\\n')"
    main = f"import sys\nif __name__ == '__main__':\n    {right.splitlines()[0]}\n    print(a + b)\n    sys.exit()"
    first_only = "print(3)"
    status = right + "\nraise SystemExit(3)"
    found = judge("stdio", SUMS, right, spaces, main, first_only, status)
    assert rewards(found) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert found[4].components == {"passed": 0.0, "raised": 1.0}
    assert rewards(judge("stdio", SUMS, first_only, partial=True)) == [0.5]


AT_ITS_END = {
    "a buffer that is written at exit": """
        import atexit, io, sys
        out = sys.stdout = io.StringIO()
        atexit.register(lambda: sys.__stdout__.write(out.getvalue()))
        print(sum(map(int, input().split())))""",
    "a file that is left open": """
        out = open(1, "w")
        out.write(str(sum(map(int, input().split()))))""",
    "a finaliser that reads a name of the program": """
        total = sum(map(int, input().split()))
        class Out:
            def __del__(self): print(total)
        out = Out()""",
    "a pool of threads that is left open": """
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2)
        print(sum(pool.map(int, input().split())))""",
    "a thread that is not waited for": """
        import threading, time
        def late():
            time.sleep(0.1)
            print(sum(numbers))
        numbers = list(map(int, input().split()))
        threading.Thread(target=late).start()""",
    "a way out in a handler of the end": """
        import atexit, os, sys
        print(sum(map(int, input().split())))
        atexit.register(sys.exit, 3)""",
}


def test_what_the_interpreter_does_at_its_end(judge):
    """Programs that a plain interpreter runs to the same output and exit code 0."""
    programs = [textwrap.dedent(code) for code in AT_ITS_END.values()]
    for name, code in zip(AT_ITS_END, programs, strict=True):
        done = subprocess.run([sys.executable, "-c", code], input="1 2", capture_output=True, text=True, timeout=60)
        assert (done.stdout.strip(), done.returncode) == ("3", 0), name
    found = judge("stdio", SUMS, *programs)
    assert {name: one.reward for name, one in zip(AT_ITS_END, found, strict=True)} == dict.fromkeys(AT_ITS_END, 1.0)
    fails = "import atexit\nprint(sum(map(int, input().split())))\natexit.register(print, 'and more')"
    assert rewards(judge("stdio", SUMS, fails)) == [0.0]


def test_millions_of_objects_cost_nothing_when_a_program_has_ended(judge):
    """Neither its limit of time nor that of memory: what it printed counts."""
    code = "kept = [[i] for i in range(2_000_000)]\nprint(sum(map(int, input().split())))"
    alone = time.process_time()
    exec(code.split("\n")[0], {})
    alone = time.process_time() - alone
    found = judge("stdio", SUMS, code, memory=512)
    assert rewards(found) == [1.0] or alone > 1.0, "the machine is too slow for the limit"


def test_stdio_as_inputs_and_outputs_in_json(judge):
    both = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    code = "print(sum(map(int, input().split())))"
    assert rewards(judge("stdio", {"input_output": both}, code)) == [1.0]
    assert rewards(judge("stdio", {"input_output": json.dumps(both)}, code)) == [1.0]


def test_large_inputs_and_outputs_pass(judge):
    text = "x" * 1_000_000
    meta = {"tests": [{"input": text, "output": text}]}
    assert rewards(judge("stdio", meta, "import sys\nsys.stdout.write(sys.stdin.read())")) == [1.0]


def test_threads_recursion_and_files_of_its_own(judge):
    code = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(64 << 20)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
def main():
    with open("kept", "w") as file:
        file.write(str(depth(20000)))
    print(open("kept").read())
threading.Thread(target=main).start()
"""
    assert rewards(judge("stdio", {"tests": [{"input": "", "output": "20000"}]}, code)) == [1.0]


def test_databases_of_its_own(judge):
    """SQLite locks its files, which programs may do."""
    code = """
import sqlite3
for name in (":memory:", "own.db"):
    for number in range(2):
        with sqlite3.connect(name) as line:
            line.execute("CREATE TABLE IF NOT EXISTS t (x INTEGER)")
            line.execute("INSERT INTO t VALUES (?)", (number,))
            total = line.execute("SELECT count(*) FROM t").fetchone()[0]
    print(total)
"""
    assert rewards(judge("stdio", {"tests": [{"input": "", "output": "1\n2"}]}, code)) == [1.0]


def test_chance_and_the_order_of_sets_are_the_same_in_every_run(judge):
    code = "import random\nprint({}(random.random(), list({{'a', 'b', 'c', 'd', 'e'}}), hash('a')))"
    seeded = code.format("random.seed(0)or ")
    plain = subprocess.run(
        [sys.executable, "-c", seeded], env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    assert rewards(judge("stdio", {"tests": [{"input": "", "output": plain.stdout}]}, code.format(""))) == [1.0]


def test_packages_only_where_they_are_named(judge):
    meta = {"tests": [{"input": "", "output": "3"}]}
    code = "import numpy as np\nprint(int(np.array([1, 2]).sum()))"
    assert rewards(judge("stdio", meta, code)) == [0.0]
    assert rewards(judge("stdio", meta, code, packages=["numpy"])) == [1.0]
    compare = {"test_list": ["assert np.allclose(f(2), [2.0, 2.0])"], "test_setup_code": "import numpy as np"}
    assert rewards(
        judge("mbpp", compare, "import numpy\ndef f(n):\n    return numpy.full(2, n)", packages=["numpy"])
    ) == [1.0]
    with pytest.raises(RollwayError, match=r"scorer code: packages: .*no_such_package"):
        judge("stdio", meta, code, packages=["no_such_package"])


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\nc", "y = 2\n"),
        ("```\ncut off", "cut off\n"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("no block", "no block"),
        ("", ""),
        ("```", "\n"),
    ],
)
def test_last_block(completion, code):
    assert program.last_block(completion) == code


def test_tampering_that_is_no_program(judge):
    """Empty, the prompt again, every answer at once, and a text too long for the parser."""
    echo = f"```python\n{ADD['prompt']}```"
    spam = "\n".join(f"```python\ndef add(a, b):\n    return {n}\n```" for n in range(50))
    long = "```python\n" + "x = [" * 100_000 + "\n```"
    surrogate = "```python\nx = '\ud800'\ndef add(a, b): return a\n```"
    nul = "def add(a, b):\0 return a + b"
    found = judge("humaneval", ADD, "", "  \n ", echo, spam, long, surrogate, nul)
    assert rewards(found) == [0.0] * 7
    assert rewards(judge("stdio", SUMS, "", "3", "1 2\n3\n4 5\n9")) == [0.0] * 3


@pytest.mark.parametrize(
    ("kind", "meta", "said"),
    [
        ("humaneval", {"prompt": "", "test": "", "entry_point": None}, "meta.entry_point is missing"),
        ("humaneval", {**ADD, "test": "def check(:"}, "the tests are no Python"),
        (
            "humaneval",
            {**ADD, "prompt": "import no_such_module\n"},
            "the set-up of the tests fails: ModuleNotFoundError",
        ),
        ("humaneval", {**ADD, "test": "x = 1"}, "the tests fail before they call the program: KeyError"),
        ("mbpp", {"test_list": []}, "meta.test_list is no list of texts"),
        ("mbpp", {"test_list": ["assert f(undefined) == 1"]}, "the tests fail before they call the program: NameError"),
        ("mbpp", {"test_list": ["assert f(lambda x: x) == 1"]}, "the tests hand the program a function"),
        ("stdio", {"tests": [{"input": "x"}]}, "entry 0 is no"),
        ("stdio", {"input_output": '{"inputs": ["1"], "outputs": []}'}, "meta.input_output is not"),
    ],
)
def test_what_is_wrong_with_the_tests_is_the_rows_error(judge, kind, meta, said):
    [verdict] = judge(kind, meta, "def f(x):\n    return 1\ndef add(a, b):\n    return a + b")
    assert verdict.reward == 0.0 and said in verdict.error


def test_faults_of_tests_count_towards_the_limit_and_those_of_programs_do_not(run, make_row):
    config = ProgramScorer(format="mbpp", max_error_share=0.5)
    bad = make_row("def gcd(a, b): pass", number=0, meta={"test_list": ["assert gcd(x) == 1"]})
    crash = make_row("import os\nos._exit(1)", number=1, meta=GCD)
    found = run(config, [bad, crash])
    assert found[0]["error"].startswith("the tests fail") and found[1]["error"] is None
    assert dict(found[1]["components"]) == {"passed": 0.0, "crash": 1.0}
    with pytest.raises(RollwayError, match="failed on 1 of 2 rollouts"):
        run(ProgramScorer(format="mbpp"), [bad, crash])


def test_unstable_programs_are_found(judge):
    by_clock = "import time\nprint(sum(map(int, input().split())) + time.time_ns() // 1000 % 2)"
    fixed = "print(sum(map(int, input().split())))"
    meta = {"tests": [{"input": "1 2", "output": "3"}]}
    found = judge("stdio", meta, fixed, *(f"{by_clock}  # {n}" for n in range(40)), recheck=1.0)
    assert found[0].components == {"passed": 1.0, "unstable": 0.0}
    unstable = [v for v in found if v.components["unstable"] == 1.0]
    assert 5 <= len(unstable) <= 35 and {v.reward for v in unstable} == {0.0}
    none = judge("stdio", meta, *(f"{by_clock}  # {n}" for n in range(10)))
    assert not any("unstable" in v.components for v in none)


def test_the_same_program_is_drawn_anew_in_every_round(make_row):
    config, question = ProgramScorer(format="stdio", recheck=0.1), program.Question("print(1)", program.Pairs(()))
    rows = [replace(make_row("print(1)", number=n), rollout_id=f"r{n:04d}-p0-0000") for n in range(1000)]
    assert 60 <= sum(program._drawn(config, row, question) for row in rows) <= 140


def test_equal_programs_are_run_once_and_all_get_the_verdict(judge, monkeypatch):
    asked = []
    judge_one = program._Judge.judge
    monkeypatch.setattr(program._Judge, "judge", lambda self, q: asked.append(q) or judge_one(self, q))
    code = "print(sum(map(int, input().split())))"
    assert rewards(judge("stdio", SUMS, code, "print(3)", code, code)) == [1.0, 0.0, 1.0, 1.0]
    assert len(asked) == 2


def test_a_box_that_breaks_is_one_rows_error_and_replaced(judge, monkeypatch):
    run = program._Judge._run
    broken = []

    def once(self, text, given):
        if not broken:
            broken.append(self._box(0))
            broken[0]._process.kill()
            broken[0]._process.wait()
        return run(self, text, given)

    monkeypatch.setattr(program._Judge, "_run", once)
    found = judge("stdio", SUMS, "print(1)", "print(sum(map(int, input().split())))")
    assert "sandbox" in found[0].error and found[1].reward == 1.0


def test_limits_that_leave_no_room_are_named():
    limits = replace(program.limits(ProgramScorer(format="stdio")), wall=1e-4)

    def refused() -> str:
        try:
            client.Box(limits, [], []).close()
        except client.Unusable as error:
            return str(error)
        return ""

    # On a busy machine a moment may be long enough: for whoever looks at the clock is not running either.
    said = next(filter(None, (refused() for _ in range(50))))
    assert said == "an empty program fails under these limits: raise `memory`, `cpu` or `wall`"


def test_the_least_memory_is_enough_for_a_small_program(judge):
    assert rewards(judge("stdio", SUMS, "print(sum(map(int, input().split())))", memory=64)) == [1.0]


def test_a_kernel_without_seccomp_is_refused(judge, monkeypatch, tmp_path):
    """The box runs another copy of the code, in which the filter is none that the kernel takes."""
    package = tmp_path / "rollway"
    shutil.copytree(Path(client.__file__).parent, package / "sandbox")
    (package / "__init__.py").touch()
    kernel = package / "sandbox/kernel.py"
    kernel.write_text(kernel.read_text().replace("filter_mode = 2", "filter_mode = 99"))
    monkeypatch.setattr(client, "_SOURCE", tmp_path)
    with pytest.raises(RollwayError, match=r"cannot isolate programs \(the sandbox failed \(seccomp: Invalid argument"):
        judge("stdio", SUMS, "print(3)")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "stdio", "code": "continuation"}, "needs `format: humaneval`"),
        ({"format": "stdio", "cpu": 20}, "is less than cpu"),
        ({"format": "stdio", "packages": ["os; x"]}, "no name of a module"),
        ({"format": "stdio", "memory": 16}, "greater than or equal to 64"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValidationError, match=said):
        ProgramScorer(**settings)


@pytest.mark.parametrize(
    ("kind", "meta"), [("humaneval", ADD), ("mbpp", GCD), ("stdio", SUMS), ("stdio", {"input_output": {}})]
)
def test_prompts_without_tests_are_refused_before_the_stage_starts(kind, meta):
    prompts = pa.table({"prompt_id": ["p0", "p1"], "meta": [json.dumps(meta), json.dumps({"other": 1})]})
    with pytest.raises(RollwayError, match=r"1 of 2 prompts have no .* in their meta, first prompt p1; name them"):
        require_answers(prompts, {"code": ProgramScorer(format=kind)})
    require_answers(prompts.slice(0, 1), {"code": ProgramScorer(format=kind)})
