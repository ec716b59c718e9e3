"""Threads of a stage come from Snakemake, and pin torch."""

import re
from pathlib import Path

import torch

from rollway.runtime.device import compute
from workflow.project import Project


def test_set_threads_reaches_the_command_of_the_stage(tmp_path: Path) -> None:
    planned = Project(tmp_path).snakemake("--dry-run", "--printshellcmds", "--set-threads", "train=2").stdout
    for stage, threads in (("train", "2"), ("rollout", "1")):
        given = set(re.findall(rf"rollway stage {stage} .*?--threads (\d+)", planned))
        assert given == {threads}, stage


def test_a_stages_threads_pin_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            with compute(threads):
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
