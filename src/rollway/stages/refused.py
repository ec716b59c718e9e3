"""The rows of a step that must not be taken, kept to look at."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.store.atomic import write_json


@contextmanager
def told_of(made: Path, stage: str, round: int | None) -> Iterator[None]:
    """Writes the rows of a step that was refused into `failed/{stage}.json` beside the file `made`, the worst first;
    removes what an earlier attempt left there. Raises RollwayError, which names that file."""
    from rollway.training.guards import UpdateRefused

    place = made.parent / "failed" / f"{stage}.json"
    try:
        yield
    except UpdateRefused as error:
        rows = [{name: _written(value) for name, value in row.items()} for row in error.rows]
        figures = {name: _written(value) for name, value in error.figures.items()}
        write_json(place, {"round": round, "stage": stage, **figures, "rows": rows})
        raise RollwayError(f"{error}. All rows of that step, the worst first, are in {place}") from None
    place.unlink(missing_ok=True)
    with suppress(OSError):
        place.parent.rmdir()


def _written(value: Any) -> Any:
    """JSON has no numbers for what is not finite: they become text, nan and inf."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
