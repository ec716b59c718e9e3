"""The sandbox for ordinary users, for root of a container, and where the kernel lets nobody isolate anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rollway
from sandbox import hostile

BECOME = """
import json, os, sys
from rollway.sandbox import kernel

def see(folder):
    "Shows others a folder below one that is closed to them, in this process's mounts alone."
    for above in reversed([folder, *folder.parents]):
        if not above.stat().st_mode & 1:
            kernel.mount(str(folder), "/mnt", None, kernel.MS_BIND | kernel.MS_REC)
            kernel.mount("tmpfs", str(above), "tmpfs", 0, "mode=0755")
            folder.mkdir(parents=True, exist_ok=True)
            kernel.mount("/mnt", str(folder), None, kernel.MS_BIND | kernel.MS_REC)
            return

from pathlib import Path
user, inner, most, keep = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "keep"
if os.geteuid() == 0 and not keep:
    kernel.unshare(kernel.NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    for folder in json.loads(sys.argv[6]):
        see(Path(folder))
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
maps = {"setgroups": "deny", "uid_map": f"{user} {os.geteuid()} 1", "gid_map": f"{user} {os.getegid()} 1"}
if inner:
    kernel.unshare(kernel.NEWUSER)
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
if most:
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write(most)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[5]])
"""
"""Becomes an ordinary user if it is root, then if wanted one of a user namespace. After `exec` it is what it says."""

JUDGE = """
import json, os, sys
from rollway.config.scorers import ProgramScorer
from rollway.errors import RollwayError
from rollway.scorers import Row, program
found = []
for settings, text, meta in json.loads(sys.stdin.read()):
    row = Row("r", "p", "g", 0, text, 1, "stop", [], "t", [], None, meta)
    try:
        [verdict] = program.verdicts("code", ProgramScorer(code="all", **settings), [row], 1)
        found.append([verdict.reward, verdict.components, verdict.error])
    except RollwayError as error:
        found.append(str(error))
print(json.dumps([os.geteuid(), found]))
"""


def judged(user, questions, *, inner, most="", keep=False):
    """Asked of a process that sees itself as `user`, in a user namespace of its own or not."""
    folders = json.dumps([sys.base_prefix, sys.prefix, str(Path(rollway.__file__).parents[2])])
    options = [str(user), "inner" * inner, most, "keep" * keep, JUDGE, folders]
    done = subprocess.run(
        [sys.executable, "-c", BECOME, *options],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    who, found = json.loads(done.stdout)
    assert who == user
    return found


def question(case, world):
    settings = {"cpu": 1, "wall": 8.0, "memory": 256, "output": 1, **case.settings}
    settings["format"] = "stdio" if case.by == "stdio" else "humaneval"
    return settings, world.written_for(case), world.meta(case)


HONEST = ({"format": "stdio"}, "print(input())", {"tests": [{"input": "7", "output": "7"}]})
ORDINARY = os.geteuid() or 65534


@pytest.mark.parametrize(("user", "inner"), [(ORDINARY, False), (0, True)], ids=["ordinary", "root of a container"])
def test_hostile_programs_are_contained_for_other_users(user, inner, world, monkeypatch):
    monkeypatch.setenv("ROLLWAY_TEST_KEY", world.secret)
    groups = [hostile.SECRETS, hostile.WRITING, hostile.NETWORK, hostile.KERNEL]
    cases = [case for group in groups for case in group if case.name != "other_architecture"]
    cases += [case for case in hostile.ALL if case.name in ("fork_bomb", "memory_by_processes", "full_disk", "exit_0")]
    first, *found = judged(user, [HONEST, *(question(case, world) for case in cases)], inner=inner)
    assert first == [1.0, {"passed": 1.0}, None]
    for case, verdict in zip(cases, found, strict=True):
        expected = [0.0, {"passed": 0.0, **({case.ends: 1.0} if case.ends else {})}, None]
        assert verdict == expected, case.name
    assert world.untouched()


@pytest.mark.parametrize("user", [0, 1000])
def test_where_nothing_isolates_nothing_is_run(user, tmp_path):
    """One sentence: what is missing, and what to do."""
    [said] = judged(user, [HONEST], inner=True, most="0")
    assert said.startswith("scorer code: this machine cannot isolate programs (unshare: No space left on device); ")
    assert "kernel.unprivileged_userns_clone = 1" in said and "\n" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_root_by_another_name_is_refused_for_no_limit_of_processes_holds_it():
    [said] = judged(1000, [HONEST], inner=True, keep=True)
    assert "no limit of processes holds for the kernel's own root" in said
