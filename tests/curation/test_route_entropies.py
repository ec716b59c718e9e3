"""How evenly the rows of a route count, as curation logs it (SCOPE, arXiv 2604.10688, procedure 8)."""

import math

import pytest

from curation.tables import scored_table
from rollway.config.curation import CurateConfig
from rollway.curation import curate
from rollway.curation.summary import summary


def test_entropies_of_weights_by_route() -> None:
    """The spec's worked weights and a group of one wrong rollout, whose entropy is 0; equal weights give ln n."""
    table = scored_table(
        [[1, 1, 0, 0], [0]],
        mean_logprob=[-0.3, -1.0, -0.6, -0.6, -0.6],
        teacher=[-0.3, -2.6 / 3, -0.3, -1.5, -2.0],
    )
    found = {}
    for tau in (1.0, 1e8):
        config = CurateConfig.model_validate(
            {"weight": {"sql": "scope", "tau": tau}, "route": {"sql": "wrong_to_teacher"}}
        )
        found[tau] = summary(table, curate(table, config))
    right = -sum(w * math.log(w) for w in (0.331812, 0.668188))
    wrong = -sum(w * math.log(w) for w in (0.768525, 0.231475))
    assert found[1.0]["route_policy_weight_entropy"] == pytest.approx(right, abs=1e-6)
    assert found[1.0]["route_distill_weight_entropy"] == pytest.approx(wrong / 2, abs=1e-6)
    assert found[1e8]["route_policy_weight_entropy"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[1e8]["route_distill_weight_entropy"] == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_scale_of_the_weights_does_not_matter_and_weights_of_zero_count_nothing() -> None:
    table = scored_table([[1, 1, 0], [1, 0, 0]], mean_logprob=[-1.0] * 6, teacher=[-1.0] * 6)
    for mean_one in (False, True):
        config = CurateConfig.model_validate(
            {"weight": {"sql": "scope", "mean_one": mean_one}, "route": {"sql": "wrong_to_teacher"}}
        )
        found = summary(table, curate(table, config))
        assert found["route_policy_weight_entropy"] == pytest.approx(math.log(2) / 2)
        assert found["route_distill_weight_entropy"] == pytest.approx(math.log(2) / 2)
    config = CurateConfig.model_validate({"weight": {"sql": "pf_ppo", "keep": "bon"}, "route": {"sql": "correctness"}})
    found = summary(table, curate(table, config))
    assert found["route_right_weight_entropy"] == 0.0
    assert "route_wrong_weight_entropy" not in found
