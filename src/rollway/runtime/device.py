"""Threads and device of a stage that computes with torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollway.config.rollouts import Engine, VllmEngine
from rollway.runtime.device_lock import hold_devices, visible_devices


@contextmanager
def compute(threads: int, engine: Engine | None = None) -> Iterator[None]:
    """Holds a GPU where there is one, as many as `engine` spans, and pins torch to the threads that Snakemake gave the
    job.

    Bytes on the CPU depend on the number of threads, not on the machine.
    """
    owner = None
    if isinstance(engine, VllmEngine):
        from rollway.engines.vllm_launch import home

        found = home()
        owner = None if found is None else str(found.folder)
    with hold_devices(count=devices_of(engine), engine=owner):
        import torch

        torch.set_num_threads(threads)
        yield


def devices_of(engine: Engine | None) -> int:
    """GPUs that a job takes which samples with `engine`."""
    return engine.tensor_parallel if isinstance(engine, VllmEngine) else 1


def gpus_per_job() -> int:
    """What a job of the compute stages asks of Snakemake's `gpu` resource: 1 on a machine with GPUs, else 0."""
    return 1 if visible_devices() else 0


def shared(*, local: bool) -> dict[str, int]:
    """What Snakemake may give away at a time: all GPUs of this machine where jobs run here, and one writer to MLflow.

    A cluster counts its own GPUs, and the machine that submits knows nothing of them.
    """
    gpus = len(visible_devices()) if local else 0
    return {"mlflow": 1, **({"gpu": gpus} if gpus else {})}
