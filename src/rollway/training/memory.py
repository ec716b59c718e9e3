"""Out of memory: one sentence that names what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from rollway.errors import RollwayError, is_out_of_memory

_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def names_micro_tokens(micro_tokens: int, checkpointing: bool) -> Iterator[None]:
    """Turns an allocation that failed, on a GPU or on the CPU, into a RollwayError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        more = "" if checkpointing else ", or set gradient_checkpointing: true in a warm-up policy of kind huggingface"
        raise RollwayError(
            f"train: out of memory; nothing was saved. Lower train.micro_tokens (now {micro_tokens}; the result does "
            f"not depend on it){more}. {_first_sentence(error)}"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """What was asked for, without the advice to users of torch."""
    text = str(error).partition("\n")[0]
    return text.partition("]")[2].strip(" .") if _CPU_ALLOCATOR in text else text
