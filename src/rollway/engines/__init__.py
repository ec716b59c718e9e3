"""Rollout engines."""

from functools import partial

from rollway.config.rollouts import Engine, StoredEngine, TransformersEngine, VllmEngine
from rollway.engines.base import Completion, Generate, Request
from rollway.errors import RollwayError

__all__ = ["Completion", "Generate", "Request", "make"]


def make(engine: Engine) -> Generate:
    """The engine that the config names. Raises RollwayError where it is not installed."""
    match engine:
        case TransformersEngine():
            from rollway.engines import transformers_engine

            return partial(transformers_engine.generate, batch=engine.batch)
        case VllmEngine():
            raise RollwayError(
                "rollout.engine.kind: vllm can be planned but not run: this version has no vLLM engine yet; "
                "set `rollout.engine: {kind: transformers}`"
            )
        case StoredEngine():
            raise RollwayError(
                "rollout.engine.kind: stored holds completions of training prompts and answers no others; "
                "set `rollout.engine: {kind: transformers}`"
            )
