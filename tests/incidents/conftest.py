"""Fixtures of the incident suite."""

import pytest
import torch
from torch.nn import functional

from rollway.policies.logprobs import Head


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _double_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in the model's own float64, so that 1e-10 can be asked for."""
    monkeypatch.setattr(Head, "logits", lambda self, states: functional.linear(states, self.weight))
