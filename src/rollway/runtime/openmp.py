"""How torch's threads wait for one another on the CPU."""

import os

SPIN = "10000"
"""Turns of a waiting thread before it sleeps."""


def spin_briefly() -> None:
    """To be called before torch is imported. Does nothing where the environment says how to wait.

    GNU's OpenMP lets a thread that waits turn for milliseconds, on a core that another job of the workflow could use: a
    forward and backward pass of two threads beside one busy process took 2.5 s, and 1.3 s so; alone 0.53 s either way.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
