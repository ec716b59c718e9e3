"""Losses that no row is routed to are told, and nothing else is."""

from typing import Any

import pyarrow as pa
import pytest

from rollway.config.objectives import Objective
from rollway.stages.train import _unused_losses

PARTS: dict[str, Any] = {"ratio": "token", "gate": "clip", "aggregate": "token_mean", "distill": {"rows": "routed"}}
TEACHER, OWN = "the teacher's loss", "the policy's own loss"


@pytest.mark.parametrize(
    ("routes", "given", "said"),
    [
        (["policy", "policy"], {}, TEACHER),
        (["distill"], {}, OWN),
        (["policy", "distill"], {}, ""),
        (["both"], {}, ""),
        ([None, "distill"], {}, ""),
        ([], {}, ""),
        (["expert"], {}, f"{TEACHER} or {OWN}"),
        (["policy"], {"distill": {"rows": "all"}}, ""),
    ],
)
def test_a_loss_without_rows_is_told(routes: list[str | None], given: dict[str, Any], said: str) -> None:
    objective = Objective.model_validate(PARTS | given)
    assert _unused_losses(pa.chunked_array([pa.array(routes, pa.string())]), objective) == said
