"""policy.json: round trip, digests, and one clear sentence for every kind of damage."""

import json
import subprocess
import sys

import pytest

from rollway.errors import RollwayError
from rollway.policies.manifest import (
    NamedPolicy,
    PolicyManifest,
    digest,
    file_sha256,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def policy_json(tmp_path):
    weights = tmp_path / "weights" / "main"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "optimizer.safetensors").write_bytes(b"state")
    named = NamedPolicy("full", "weights/main", files={"model.safetensors": file_sha256(weights / "model.safetensors")})
    state = {"state/optimizer.safetensors": file_sha256(tmp_path / "state" / "optimizer.safetensors")}
    write_manifest(tmp_path / "policy.json", PolicyManifest("causal_lm", {"main": named}, state, 3))
    return tmp_path / "policy.json"


def test_round_trip_and_same_bytes(policy_json):
    manifest = read_manifest(policy_json)
    before = digest(policy_json)
    write_manifest(policy_json, manifest)
    assert digest(policy_json) == before
    assert len(before) == 16
    assert manifest.updates == 3
    assert verify(policy_json) == manifest


def test_changed_weights_are_named(policy_json):
    (policy_json.parent / "weights/main/model.safetensors").write_bytes(b"weight")
    with pytest.raises(RollwayError, match=r"model\.safetensors.*truncated.*snakemake --force"):
        verify(policy_json)


def test_missing_weights_are_named(policy_json):
    (policy_json.parent / "weights/main/model.safetensors").unlink()
    with pytest.raises(RollwayError, match=r"model\.safetensors.*no such file.*warmup or train"):
        verify(policy_json, "main")


def test_state_is_checked_with_everything(policy_json):
    (policy_json.parent / "state/optimizer.safetensors").write_bytes(b"other")
    verify(policy_json, "main")
    with pytest.raises(RollwayError, match=r"optimizer\.safetensors"):
        verify(policy_json)


def test_unknown_name(policy_json):
    with pytest.raises(RollwayError, match=r"no policy named 'ema'.*main"):
        verify(policy_json, "ema")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "family": "x", "policies": {"main": {"odd": 1}}}']
)
def test_damaged(tmp_path, text):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(RollwayError, match=r"policy\.json"):
        read_manifest(tmp_path / "policy.json")


def test_other_version(policy_json):
    raw = json.loads(policy_json.read_text())
    policy_json.write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(RollwayError, match="version 99"):
        read_manifest(policy_json)


def test_missing(tmp_path):
    with pytest.raises(RollwayError, match="missing"):
        read_manifest(tmp_path / "policy.json")
    with pytest.raises(RollwayError, match="cannot be read"):
        digest(tmp_path / "policy.json")


def test_light_modules_import_no_torch():
    code = (
        "import sys, rollway.policies.manifest, rollway.sampling.prompts, rollway.sampling.noise, rollway.engines;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
