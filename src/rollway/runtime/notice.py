"""Progress bars and notices of long stages: on a terminal a bar, elsewhere silence but for the notices."""

import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rollway.printable import printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress


def notice(message: str) -> None:
    """One line for the user, on stderr."""
    print(f"rollway: {printable_lines(message)}", file=sys.stderr, flush=True)


class Bar:
    """What a stage has done so far. Calling it with (steps, info) advances it; without a terminal it only counts.

    Engines and scorers, deep below the stage, advance it through `tick`, from any thread.
    """

    def __init__(self, title: str, total: int, draw: "Progress | None" = None) -> None:
        self.total, self.done, self.tokens, self.info = total, 0, 0, ""
        self._rewards, self._rewarded = 0.0, 0
        self._started, self._lock, self._draw = time.monotonic(), threading.Lock(), draw
        self._task = None if draw is None else draw.add_task(title, total=total, info="")

    def __call__(self, steps: int, info: str = "") -> None:
        self.add(steps, info=info)

    def add(self, steps: int, *, tokens: int = 0, rewards: float = 0.0, rewarded: int = 0, info: str = "") -> None:
        """`rewards`: sum over `rewarded` rows; `tokens`: written or read in these steps; `info`: a short text."""
        with self._lock:
            self.done = min(self.total, self.done + steps)
            self.tokens += tokens
            self._rewards, self._rewarded = self._rewards + rewards, self._rewarded + rewarded
            self.info = info or self.info
            if self._draw is not None and self._task is not None:
                self._draw.update(self._task, completed=self.done, info=self.said())

    def reach(self, done: int, info: str = "") -> None:
        """At least `done` steps are done: for what cannot tell them one by one."""
        self.add(max(0, done - self.done), info=info)

    def said(self) -> str:
        """Tokens per second, the mean reward so far, and the stage's own words; each only where there is something."""
        seconds = max(1e-6, time.monotonic() - self._started)
        parts = [f"{self.tokens / seconds:,.0f} tokens/s"] if self.tokens else []
        parts += [f"reward {self._rewards / self._rewarded:.3f}"] if self._rewarded else []
        return "  ".join([*parts, self.info] if self.info else parts)


_current: Bar | None = None


def tick(steps: int = 1, *, tokens: int = 0, reward: float | None = None) -> None:
    """Advances the bar of the stage that is running, if there is one. reward: the mean over these steps."""
    if _current is not None:
        rewarded = 0 if reward is None else steps
        _current.add(steps, tokens=tokens, rewards=(reward or 0.0) * rewarded, rewarded=rewarded)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """Yields the stage's bar; on a terminal it is drawn with the time left, and is gone at the end.

    Jobs that run at the same time share the terminal: one of them draws, the others are silent.
    """
    global _current
    with _terminal() as free:
        if not free:
            with _as_current(Bar(title, total)) as bar:
                yield bar
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", markup=False),
        )
        drawing = Progress(*columns, console=Console(stderr=True), transient=True)
        with drawing as drawn, _as_current(Bar(title, total, drawn)) as bar:
            yield bar


@contextmanager
def _as_current(bar: Bar) -> Iterator[Bar]:
    global _current
    before, _current = _current, bar
    try:
        yield bar
    finally:
        _current = before


@contextmanager
def _terminal() -> Iterator[bool]:
    """Whether stderr is a terminal that no other job draws on; it is held until the end of the block."""
    held: TextIO | None = None
    try:
        if sys.stderr.isatty():
            try:
                held = open(os.ttyname(sys.stderr.fileno()), "w")  # noqa: SIM115 (closed below)
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # a terminal that cannot be opened or locked is drawn on all the same
            yield True
        else:
            yield False
    finally:
        if held is not None:
            held.close()
