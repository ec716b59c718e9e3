from pathlib import Path

import pytest

from rollway.config.policies import CharTokenizer, ScratchPolicy
from rollway.policies import causal_lm, manifest
from store.synthetic import make_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two rounds of one run with every table, and a policy of half a thousand weights after each."""
    root = make_results(tmp_path / "results", {"a-s0": 2})
    config = ScratchPolicy(
        tokenizer=CharTokenizer(alphabet="abc+=0123456789"), layers=1, hidden=16, heads=2, kv_heads=1, intermediate=16
    )
    for round in (1, 2):
        policy = causal_lm.build(config, [], seed=round)
        folder = root / "a-s0" / f"r{round:04d}"
        named = {"main": causal_lm.save(folder, policy)}
        manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", named, updates=round))
    return root
