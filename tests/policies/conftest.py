"""Small policies."""

import pytest
import torch

from rollway.config.policies import ScratchPolicy
from rollway.policies import causal_lm
from rollway.policies.manifest import PolicyManifest, write_manifest

torch.set_num_threads(1)

TINY = ScratchPolicy(layers=2, hidden=32, heads=4, kv_heads=2, intermediate=64, context=64)


@pytest.fixture
def policy():
    return causal_lm.build(TINY, [], seed=0, device="cpu")


@pytest.fixture(scope="session")
def store_policy():
    def store(folder, policy, name="main", **kwargs):
        named = causal_lm.save(folder, policy, name, **kwargs)
        write_manifest(folder / "policy.json", PolicyManifest("causal_lm", {name: named}))
        return folder / "policy.json"

    return store
