"""Progress bars and notices of long stages: on a terminal a bar, elsewhere silence but for the notices."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]


def notice(message: str) -> None:
    """One line for the user, on stderr."""
    print(f"rollway: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Yields `advance(steps, info)`; `info` is a short text such as tokens/s or the reward so far."""
    if not sys.stderr.isatty():
        yield lambda steps, info: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, info="")
        yield lambda steps, info: bar.update(task, advance=steps, info=info)
