"""Objectives as configuration: shorthand, round trip, and parts that would do nothing."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from objectives.cases import CASES
from rollway.config.objectives import Objective
from rollway.objectives import requirements

CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}
BASE = {"ratio": "token", "gate": CLIP, "aggregate": "token_mean"}


def test_the_form_of_the_recipes() -> None:
    objective = Objective.model_validate(
        {"ratio": "token", "gate": {"kind": "clip", "low": 0.16, "high": 0.24}, "aggregate": "token_mean", "kl": "none"}
    )
    assert objective.gate.low == 0.16
    assert requirements(objective) == {"advantage", "logp_old"}
    assert not objective.corrects_behaviour()
    assert Objective.model_validate(BASE | {"correction": "tis"}).corrects_behaviour()


@pytest.mark.parametrize("name", sorted(CASES))
def test_resolved_form_reads_back(name: str) -> None:
    assert Objective.model_validate(json.loads(json.dumps(CASES[name].model_dump(mode="json")))) == CASES[name]


def test_schema_takes_names_and_mappings() -> None:
    gate = json.dumps(Objective.model_json_schema()["properties"]["gate"])
    assert '"dual_clip"' in gate
    assert "ClipGate" in gate


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"ratio": "token"}, "gate, aggregate: not given"),
        (BASE | {"ratio": "none"}, "set `ratio: token`, or `gate: none`"),
        (BASE | {"ratio": "fibre"}, "gated already"),
        (BASE | {"gate": "sft"}, "set `ratio: none`"),
        ({"ratio": "none", "gate": "sft", "aggregate": "token_mean", "correction": "tis"}, "correction cannot act"),
        ({"ratio": "none", "gate": "sft", "aggregate": "token_mean", "select": "signal_top"}, "select cannot act"),
        (BASE | {"ratio": "sequence", "mixing": "target_entropy"}, "sequence_token"),
        (BASE | {"ratio": {"kind": "token", "denominator": "behavior"}, "correction": "tis"}, "denominator: old"),
        (BASE | {"ratio": "sequence", "select": "entropy_top"}, "`ratio: sequence_token`, or `select: all`"),
        (BASE | {"ratio": "sequence", "select": "curvature"}, "select curvature acts on single tokens"),
        (BASE | {"ratio": "sequence", "correction": "tis"}, "or the correction's `level: sequence`"),
        ({"ratio": "none", "gate": "none", "aggregate": "token_mean", "anchors": "unit"}, "anchors: none"),
        (BASE | {"select": {"kind": "signal_top", "share": 0.5, "final": 0.5}}, "final: null"),
        (BASE | {"preference": "dpo"}, "ratio, gate, aggregate would do nothing"),
        ({"preference": "dpo", "kl": {"kind": "k3", "beta": 0.1}}, "kl would do nothing"),
        ({"preference": "copg", "entropy_bonus": 0.1}, "entropy_bonus would do nothing"),
        (BASE | {"aggregate": "seq_sum_const"}, "l_max"),
        (BASE | {"aggregate": {"kind": "token_mean", "l_max": 4}}, "l_max"),
        (BASE | {"gate": {"kind": "clip", "c": 3.0}}, "Extra inputs"),
        (BASE | {"gate": {"kind": "variance", "dual": {"kind": "fixed", "eta": 1.0}}}, "Extra inputs"),
        (BASE | {"clip": 0.2}, "Extra inputs"),
        (BASE | {"kl": "k3"}, "beta"),
        (BASE | {"gate": "klip"}, "klip"),
    ],
)
def test_what_cannot_act_is_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(parts)


def test_configuration_imports_no_torch() -> None:
    code = "import sys, rollway.config.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
