"""Objectives: pure functions on a typed batch of tokens. `loss` and `TokenBatch` are public API."""

from rollway.objectives.api import LossResult, loss, totals, value_loss
from rollway.objectives.batch import TokenBatch, route_codes
from rollway.objectives.diagnostics import whole_batch_metrics
from rollway.objectives.needs import requirements, separable, unit
from rollway.objectives.preparation import prepare, select_tokens
from rollway.objectives.states import (
    dcpo_temperature,
    initial_state,
    next_state,
    remembered,
    state_cadence,
    state_metrics,
)

__all__ = [
    "LossResult",
    "TokenBatch",
    "dcpo_temperature",
    "initial_state",
    "loss",
    "next_state",
    "prepare",
    "remembered",
    "requirements",
    "route_codes",
    "select_tokens",
    "separable",
    "state_cadence",
    "state_metrics",
    "totals",
    "unit",
    "value_loss",
    "whole_batch_metrics",
]
