"""Threads and device of a stage that computes with torch."""

import os


def use_threads(threads: int) -> None:
    """Pins torch to the threads that Snakemake gave the job: bytes on the CPU depend on this number, not on the machine."""
    import torch

    torch.set_num_threads(threads)


def device() -> str:
    """`cuda` where there is a CUDA device and ROLLWAY_DEVICE does not say otherwise, else `cpu`."""
    wanted = os.environ.get("ROLLWAY_DEVICE")
    if wanted:
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
