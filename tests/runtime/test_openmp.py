"""Threads that wait give their core away soon, unless the environment says how to wait."""

import os
import subprocess
import sys

import pytest

from rollway.runtime.openmp import SPIN, spin_briefly


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SPIN), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_what_the_environment_says_wins(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


def test_torch_reads_it_when_it_is_imported() -> None:
    """Its OpenMP tells its settings where it is asked to."""
    code = "from rollway.runtime.openmp import spin_briefly; spin_briefly(); import torch; torch.ones(9).sum()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    told = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not told:
        pytest.skip("torch's OpenMP here is not GNU's")
    assert all(SPIN in line for line in told)
