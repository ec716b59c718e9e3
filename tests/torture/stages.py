"""Stage commands of a finished project, run one by one where something is wrong with the machine.

`commands` reads them from Snakemake's dry run. `run` gives them to a process of its own, in namespaces of its own where
`within` says so: there this file runs as a program, with one warm worker for all of them.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUTS = {
    "prepare": ("--train", "--heldout"),
    "warmup": ("--policy",),
    "reward_model": ("--reward-model", "--metrics"),
    "rollout": ("--rollouts",),
    "score": ("--scores",),
    "curate": ("--batch", "--metrics"),
    "train": ("--next-policy", "--metrics"),
    "evaluate": ("--evals", "--metrics"),
    "describe": ("--run",),
    "catalog": ("--database",),
    "report": ("--html",),
    "track": ("--tracked",),
}
"""Options of each stage that name the files it writes."""
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")
NO_ROOT = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
"""Root is bound by the modes of files there, as anybody is."""
LIMIT = 300
"""Seconds for all jobs of a plan: some twenty times what they take."""


@dataclass(frozen=True)
class Command:
    """`rollway ARGV`."""

    stage: str
    argv: tuple[str, ...]

    def value(self, option: str) -> str:
        return self.argv[self.argv.index(option) + 1]

    def writing_to(self, folder: str) -> "Command":
        """The same, but what it writes goes into `folder`, under the names that it has."""
        argv = list(self.argv)
        for option in OUTPUTS[self.stage]:
            at = argv.index(option) + 1
            argv[at] = f"{folder}/{Path(argv[at]).name}"
        return Command(self.stage, tuple(argv))


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


def commands(dry_run: str) -> dict[str, Command]:
    """Stage -> the last of its commands in what `snakemake -n -p --forceall` says."""
    found = {}
    for line in dry_run.splitlines():
        _, said, command = line.partition("Shell command: rollway ")
        if said:
            argv = shlex.split(command)
            found[argv[1]] = Command(argv[1], tuple(argv))
    return found


def run(
    folder: Path,
    jobs: Sequence[Command],
    *,
    within: Sequence[str] = (),
    before: str = "",
    environment: Sequence[dict[str, str]] | None = None,
    everywhere: dict[str, str] | None = None,
) -> list[Ended]:
    """Runs the jobs in `folder`, after the shell commands `before`.

    environment: of each job; everywhere: of all of them and their worker.
    """
    # Not above: this file is also a program, which has no tests on its path.
    import hangs

    plan = [
        {"argv": job.argv, "environment": own} for job, own in zip(jobs, environment or [{} for _ in jobs], strict=True)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    script = f"{before}\nexec {shlex.quote(sys.executable)} -P {shlex.quote(__file__)} plan.json"

    def once(again: bool) -> list[Ended]:
        own = {**os.environ, **(everywhere or {})}
        done = hangs.run([*within, "bash", "-euc", script], folder, own, LIMIT, stderr=subprocess.PIPE)
        if done.returncode:
            raise AssertionError(f"the stages could not be run: {done.stdout}{done.stderr}")
        return [Ended(**each) for each in json.loads(done.stdout.splitlines()[-1])]

    return hangs.once_more(once)


def unavailable(within: Sequence[str], script: str = "true") -> str:
    """Why this machine cannot run things so; empty where it can."""
    try:
        done = subprocess.run([*within, "bash", "-euc", script], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "refused"


def main(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each command in turn; what it says on both streams."""
    from rollway.runtime import client

    ended = []
    with tempfile.TemporaryDirectory(prefix="rollway-stages-") as folder:
        socket = Path(folder) / "socket"
        client.start(socket, os.getpid(), Path("/dev/stderr"))
        for job in plan:
            own = {**os.environ, **job["environment"], "ROLLWAY_WORKER": str(socket)}
            command = [str(Path(sys.executable).parent / "rollway"), *job["argv"]]
            done = subprocess.run(command, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            ended.append({"code": done.returncode, "said": done.stdout + done.stderr})
        client.stop(socket)
    return ended


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
