"""Fixtures of the curation tests."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from rollway.config.curation import CurateConfig
from rollway.curation import curate


@pytest.fixture
def run() -> Callable[..., pa.Table]:
    """Curates with `step={"sql": ..., ...}` keywords."""

    def call(scored: pa.Table, given: dict[str, Any] | None = None, **parts: Any) -> pa.Table:
        return curate(scored, CurateConfig.model_validate(parts), given=given)

    return call
