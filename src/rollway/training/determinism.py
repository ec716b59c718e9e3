"""`train.deterministic`: torch's promise that the same step gives the same bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rollway.errors import RollwayError

_WORKSPACE, _FLASH = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("FLASH_ATTENTION_DETERMINISTIC", "1")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, operations whose result depends on the order in which threads finish are replaced or refused.

    cuBLAS reads its variable when it is first used: enter before any model computes. Raises RollwayError that names the
    operation which has no such form.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    for name, value in (_WORKSPACE, _FLASH):
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = str(error).partition(".")[0]
        raise RollwayError(
            f"train.deterministic: {first}; leave it out, or take another `attention` or `kernels`"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
