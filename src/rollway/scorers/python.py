"""The user's own reward function, called once per rollout."""

import importlib
import importlib.util
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from rollway.config.scorers import PythonScorer
from rollway.errors import RollwayError
from rollway.runtime.notice import tick
from rollway.scorers.rows import Row, Verdict, described


def verdicts(
    name: str, config: PythonScorer, rows: list[Row], needs: dict[str, dict[str, float]], root: Path
) -> list[Verdict | None]:
    """Calls `function(row, **params)` in order: trusted code, unlike the completions it reads.

    In this process; with `config.timeout` in one of its own. What it raises, and what it returns of the wrong type, is
    recorded on its row. Once more rows were ended by the limit than `max_error_share` allows, the others are not asked
    any more: None. Raises RollwayError when there is no such function.
    """
    asked = (row.as_dict({need: rewards[row.rollout_id] for need, rewards in needs.items()}) for row in rows)
    found: list[Verdict | None] = []
    if config.timeout is None:
        function, file = load(name, config.function, root)
        for row in asked:
            verdict = judge(function, file, row, config.params, config.feedback)
            found.append(verdict)
            tick(reward=verdict.reward)
        return found
    from rollway.scorers.python_process import Limited

    hung = 0
    with Limited(name, config, root) as process:
        for row in asked:
            verdict, over = process.ask(row)
            found.append(verdict)
            tick(reward=verdict.reward)
            hung += over
            if hung > config.max_error_share * len(rows):
                break
    return found + [None] * (len(rows) - len(found))


def judge(
    function: Callable[..., Any], file: str, row: dict[str, Any], params: Mapping[str, Any], with_feedback: bool
) -> Verdict:
    """What the function says of a row; a failed verdict where it raises, or returns what is no reward."""
    try:
        return _verdict(function(row, **params), with_feedback)
    except (Exception, SystemExit) as error:
        return Verdict.failed(_located(error, file))


def load(name: str, path: str, root: Path) -> tuple[Callable[..., Any], str]:
    """The function at `package.module:function` or `file.py:function`, and the file that defines it."""
    place, _, attribute = path.rpartition(":")
    if not place or not attribute:
        raise RollwayError(f"scorer {name}: function {path!r} must be package.module:function or file.py:function")
    try:
        module = _from_file(root / place) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise RollwayError(f"scorer {name}: {place}: no such file ({root / place})") from None
    except (Exception, SystemExit) as error:
        raise RollwayError(f"scorer {name}: {place} cannot be imported ({described(error)})") from error
    function = vars(module).get(attribute)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RollwayError(f"scorer {name}: {place} has no function {attribute!r}; it has {', '.join(own) or 'none'}")
    return function, str(module.__file__)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _verdict(returned: Any, with_feedback: bool) -> Verdict:
    match returned:
        case Mapping():
            if "reward" not in returned:
                return Verdict.failed(
                    f"returned a mapping without 'reward' (its keys: {', '.join(map(str, returned))})"
                )
            feedback = returned.get("feedback") if with_feedback else None
            if not isinstance(feedback, str | None):
                return Verdict.failed(f"returned a {type(feedback).__name__} as 'feedback', not a text or None")
            numbers = {key: value for key, value in returned.items() if not (with_feedback and key == "feedback")}
            wrong = [key for key, value in numbers.items() if not isinstance(value, Real)]
            if wrong:
                kind = type(returned[wrong[0]]).__name__
                return Verdict.failed(f"returned a {kind} as {wrong[0]!r}, not a number")
            components = {str(key): float(value) for key, value in numbers.items() if key != "reward"}
            # A text without words says nothing.
            return Verdict(float(returned["reward"]), components, feedback=(feedback or "").strip() or None)
        case Real():
            return Verdict(float(returned))
        case _:
            return Verdict.failed(f"returned a {type(returned).__name__}, not a number or a mapping with 'reward'")


def _located(error: BaseException, file: str) -> str:
    """The exception with the last line of the user's file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name} line {lines[-1]}: {described(error)}" if lines else described(error)
