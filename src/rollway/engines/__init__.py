"""Rollout engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rollway.config.rollouts import Engine, StoredEngine, TransformersEngine, VllmEngine
from rollway.engines.base import Completion, Draw, Generate, Request, TeacherShare
from rollway.errors import RollwayError

if TYPE_CHECKING:
    from rollway.policies.causal_lm import Reader

__all__ = ["Completion", "Draw", "Generate", "Request", "Served", "TeacherShare", "make", "serving"]


@dataclass(frozen=True)
class Served:
    """A policy that an engine samples from."""

    reader: Reader
    """Its tokenizer and limits."""
    draw: Draw
    """Completions of requests."""


@contextmanager
def serving(
    engine: Engine, policy_json: Path, name: str = "main", *, teacher: TeacherShare | None = None
) -> Iterator[Served]:
    """Opens the engine that the config names on a named policy. Raises RollwayError where it cannot serve.

    teacher: a model with a share in what is drawn; of engines of this process alone, as the config sees to. vLLM's
    keeps running after the block where a workflow keeps it for the next job.
    """
    from rollway.policies import causal_lm

    if isinstance(engine, VllmEngine):
        from rollway.engines.vllm_engine import session

        reader = causal_lm.load_reader(policy_json, name)
        with session(engine, policy_json, reader, name) as opened:
            yield Served(reader, opened.generate)
        return
    generate = make(engine)
    policy = causal_lm.load(policy_json, name)
    yield Served(causal_lm.reader_of(policy), partial(generate, policy, teacher=teacher))


def make(engine: Engine) -> Generate:
    """An engine of this process. Raises RollwayError for those that are not."""
    match engine:
        case TransformersEngine():
            from rollway.engines import transformers_engine

            return partial(transformers_engine.generate, batch=engine.batch)
        case VllmEngine():
            raise RollwayError("rollout.engine.kind: vllm runs in a process of its own; open it with `serving`")
        case StoredEngine():
            raise RollwayError(
                "rollout.engine.kind: stored holds completions of training prompts and answers no others; "
                "set `rollout.engine: {kind: transformers}`"
            )
