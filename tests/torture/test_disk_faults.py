"""Every stage on a disk that is full, read-only, forbidden or broken: one sentence with the file and the mend.

The disk is full because it is a tmpfs of 8 KiB that holds a file of that size. Read-only is such a mount, or a folder
without the right to write. A broken disk is a library that lets reads of one file fail with EIO (eio.c).
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from torture import subject
from torture.stages import NO_ROOT, OUTPUTS, OWN_MOUNTS, Command, Ended, commands, run, unavailable
from workflow.project import Project

FILL = "mount -t tmpfs -o size=8k tmpfs full; head -c 1M /dev/zero > full/ballast 2> /dev/null || true"


def needs(within: tuple[str, ...], script: str = "true") -> None:
    if why := unavailable(within, script):
        pytest.skip(f"no namespaces for a disk of one's own here: {why}")


@pytest.fixture(scope="module")
def of_every_stage(every: Project) -> dict[str, Command]:
    found = commands(every.snakemake("-n", "-p", "--forceall").stdout)
    assert {*found} == {*OUTPUTS}
    return found


def says(ended: Ended, stage: str, file: str, reason: str, mend: str) -> None:
    """One sentence of ours, once, and nothing of Python's."""
    errors = [line for line in ended.said.splitlines() if line.startswith("rollway: error: ")]
    assert ended.code == 1, ended.said
    assert len(errors) == 1, ended.said
    assert "Traceback" not in ended.said and "mistake in rollway" not in ended.said, ended.said
    assert errors[0].startswith(f"rollway: error: stage {stage}: "), ended.said
    for word in (file, reason, mend):
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(
    ("fault", "within", "before", "reason", "mend"),
    [
        ("full", OWN_MOUNTS, FILL, "No space left on device", "free space on that disk"),
        (
            "read-only mount",
            OWN_MOUNTS,
            "mount -t tmpfs -o size=8k tmpfs full; mount -o remount,ro full",
            "Read-only file system",
            "mount that file system for writing",
        ),
        ("no rights", NO_ROOT, "", "Permission denied", "give yourself the rights to it"),
    ],
)
def test_a_folder_that_cannot_be_written(
    every: Project,
    of_every_stage: dict[str, Command],
    fault: str,
    within: tuple[str, ...],
    before: str,
    reason: str,
    mend: str,
) -> None:
    needs(within, "mount -t tmpfs tmpfs /mnt" if before else "true")
    target = every.folder / "full"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o755)
    if not before:
        target.chmod(0o555)
    try:
        jobs = [command.writing_to("full") for command in of_every_stage.values()]
        for job, ended in zip(jobs, run(every.folder, jobs, within=within, before=before), strict=True):
            says(ended, job.stage, "full", reason, mend)
    finally:
        target.chmod(0o755)
    assert list(target.iterdir()) == []


@pytest.fixture(scope="module")
def broken_reads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which reads of the file that FAULT_EIO names fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for eio.c")
    library = tmp_path_factory.mktemp("eio") / "eio.so"
    source = Path(__file__).with_name("eio.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


READS = [
    ("prepare", "words.jsonl"),
    ("warmup", "tasks/spell/train.parquet"),
    ("reward_model", "grpo-s0/r0000/p0/rollouts-000.parquet"),
    ("reward_model", "warmups/tiny-s0/policy.json"),
    ("rollout", "tasks/spell/train.parquet"),
    ("rollout", "policy.json"),
    ("rollout", "weights/main/model.safetensors"),
    ("rollout", "weights/main/tokenizer.json"),
    ("score", "--rollouts"),
    ("curate", "rollouts-000.parquet"),
    ("curate", "scores/short-000.parquet"),
    ("train", "batch.parquet"),
    ("train", "rollouts-000.parquet"),
    ("train", "weights/main/model.safetensors"),
    ("evaluate", "heldout.parquet"),
    ("evaluate", "policy.json"),
    ("catalog", "run.json"),
    ("report", "evals.parquet"),
    ("report", "curate.json"),
    ("track", "batch.parquet"),
]
"""What each stage reads, by the end of its path, or by the option that names it."""


def test_a_file_that_cannot_be_read(
    every: Project, of_every_stage: dict[str, Command], broken_reads: dict[str, str]
) -> None:
    (every.folder / "aside").mkdir(exist_ok=True)
    jobs = [of_every_stage[stage] for stage, _ in READS]
    # What reads a whole results folder takes it from the place of its output.
    jobs = [job if job.stage in ("catalog", "report", "track") else job.writing_to("aside") for job in jobs]
    before = subject.contents(every)
    files = [job.value(file) if file.startswith("--") else file for job, (_, file) in zip(jobs, READS, strict=True)]
    all_ended = run(every.folder, jobs, environment=[{"FAULT_EIO": file} for file in files], everywhere=broken_reads)
    for job, file, ended in zip(jobs, files, all_ended, strict=True):
        says(ended, job.stage, Path(file).name, "nput/output error", "")
        assert re.search(r"; (check the disk|delete|rerun|run |mend|fetch)", ended.said), ended.said
    assert subject.differing(before, subject.contents(every)) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_given_more_room(
    copied: Callable[..., Project], continued: Project, tmp_path: Path
) -> None:
    """The whole project on a disk with little room: the second round stops, and goes on where it was."""
    needs(OWN_MOUNTS, "mount -t tmpfs tmpfs /mnt")
    project = copied(defaults={"rounds": 2})
    place, out = tmp_path / "disk", tmp_path / "out"
    place.mkdir()
    used = int(
        subprocess.run(["du", "-sk", project.folder], capture_output=True, text=True, check=True).stdout.split()[0]
    )
    command = " ".join(project.command("--cores", "2", "--nolock"))
    script = f"""
        mount -t tmpfs -o size={used + 120}k tmpfs {place}
        cp -a {project.folder}/. {place}/; cd {place}
        code=0; {command} > {tmp_path}/first 2>&1 || code=$?; echo $code > {tmp_path}/code
        mount -o remount,size=200m {place}
        {command} > {tmp_path}/second 2>&1
        cp -a {place} {out}
    """
    done = subprocess.run(
        [*OWN_MOUNTS, "bash", "-euc", script], env=project.environment(), capture_output=True, text=True, timeout=300
    )
    first = (tmp_path / "first").read_text()
    assert done.returncode == 0, done.stderr + (tmp_path / "second").read_text()
    assert (tmp_path / "code").read_text().strip() == "1", first
    assert "No space left on device" in first and "mistake in rollway" not in first, first
    ended = Project(out, project.config)
    assert different(continued, ended) == []


def different(a: Project, b: Project) -> list[str]:
    """But for the catalogue, whose bytes hold the path of its folder."""
    return [name for name in subject.differing(subject.contents(a), subject.contents(b)) if name != "rollway.duckdb"]
