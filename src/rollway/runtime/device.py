"""Threads and device of a stage that computes with torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollway.runtime.device_lock import hold_devices, visible_devices


@contextmanager
def compute(threads: int) -> Iterator[None]:
    """Holds a GPU where there is one, and pins torch to the threads that Snakemake gave the job.

    Bytes on the CPU depend on the number of threads, not on the machine.
    """
    with hold_devices():
        import torch

        torch.set_num_threads(threads)
        yield


def gpus_per_job() -> int:
    """What a job of the compute stages asks of Snakemake's `gpu` resource: 1 on a machine with GPUs, else 0."""
    return 1 if visible_devices() else 0
