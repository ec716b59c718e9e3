"""An exported policy loads with transformers alone and says the same; its card says what it is."""

import json
import shutil

import pytest
import torch
import yaml

from rollway.cli import main
from rollway.errors import RollwayError
from rollway.exporting.model import card, export_model, facts, find
from rollway.policies import causal_lm, manifest
from store.synthetic import CONFIG, write_run_info


def test_the_folder_loads_with_transformers_and_gives_the_same_logits(results, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_model(results, "a-s0", None, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    policy = causal_lm.load(results / "a-s0" / "r0002" / "policy.json")
    ids = torch.tensor([tokenizer.encode("1+1=")])
    assert ids.tolist() == [policy.tokenizer.encode("1+1=")]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, rtol=0, atol=0)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_an_earlier_round_is_another_policy(results, tmp_path):
    export_model(results, "a-s0", 1, tmp_path / "one")
    export_model(results, "a-s0", 2, tmp_path / "two")
    digests = [json.loads((tmp_path / name / "rollway.json").read_text())["policy"] for name in ("one", "two")]
    assert digests == [manifest.digest(results / "a-s0" / f"r000{r}" / "policy.json") for r in (1, 2)]
    assert digests[0] != digests[1]


def test_the_card_has_data_recipe_and_evaluation_with_intervals(results, tmp_path):
    export_model(results, "a-s0", 2, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "rollway" in front["tags"]
    assert "recipe `grpo` (GRPO), seed 0, 2 rounds, 2 optimiser updates" in text
    assert "| 0 | pass@1 | 0.250 | 0.150 to 0.350 |" in text and "| 2 | pass@1 | 0.750 | 0.650 to 0.850 |" in text
    assert f"| train | 3 | `{manifest.file_sha256(results / 'tasks/add/train.parquet')[:16]}` |" in text
    assert str(tmp_path) not in text and '"lr": 0.001' in text


@pytest.mark.parametrize(
    ("config", "shown"), [({}, "95"), ({"confidence": 0.9}, "90"), ({"confidence": 0.999}, "99.9")]
)
def test_the_card_names_the_coverage_of_the_config(results, config, shown):
    write_run_info(results, "a-s0", config={**CONFIG, "evaluate": config})
    source = find(results, "a-s0", 2)
    text = card(source, manifest.read_manifest(source.policy).policies["main"])
    assert f"| round | figure | value | {shown} % interval |" in text
    assert facts(source)["confidence"] == config.get("confidence", 0.95)


def test_the_card_says_when_the_round_was_not_evaluated(results):
    for file in ("evals.json", "evals.parquet"):
        (results / "a-s0" / "r0002" / file).unlink()
    source = find(results, "a-s0", 2)
    text = card(source, manifest.read_manifest(source.policy).policies["main"])
    assert "Round 2 itself was not evaluated; the last evaluation is of round 1." in text


def test_a_lora_is_merged_or_left_as_it_is(results, tmp_path):
    from transformers import AutoModelForCausalLM

    from rollway.config.policies import HuggingFacePolicy, LoraConfig

    base = tmp_path / "base"
    export_model(results, "a-s0", 1, base)
    config = HuggingFacePolicy(name=str(base), lora=LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    policy = causal_lm.build(config, [], seed=0)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    folder = results / "a-s0" / "r0003"
    named = {"main": causal_lm.save(folder, policy)}
    manifest.write_manifest(folder / "policy.json", manifest.PolicyManifest("causal-lm", named))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        wanted = policy.model(ids).logits
    export_model(results, "a-s0", 3, tmp_path / "merged")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    export_model(results, "a-s0", 3, tmp_path / "adapter", adapter=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with pytest.raises(RollwayError, match="is for a LoRA"):
        export_model(results, "a-s0", 2, tmp_path / "no", adapter=True)


def test_what_cannot_be_exported_is_said(results, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(RollwayError, match="exists already"):
        export_model(results, "a-s0", 2, tmp_path / "there")
    with pytest.raises(RollwayError, match="has no run 'b-s0'; it has a-s0"):
        export_model(results, "b-s0", 2, tmp_path / "out")
    with pytest.raises(RollwayError, match="rounds with weights: 1, 2"):
        export_model(results, "a-s0", 9, tmp_path / "out")
    shutil.rmtree(results / "a-s0" / "r0001" / "weights")
    with pytest.raises(RollwayError, match="weights were pruned"):
        export_model(results, "a-s0", 1, tmp_path / "out")
    (results / "a-s0" / "r0002" / "weights" / "main" / "model.safetensors").write_bytes(b"no")
    assert main(["export", "model", "a-s0", "--results", str(results), "--out", str(tmp_path / "out")]) == 1
    assert "truncated or changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_registered_version_holds_the_exported_files(results, tmp_path, capsys):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["a-s0", "--results", str(results), "--register", "speller", "--uri", uri]
    assert main(["export", "model", *arguments, "--out", str(tmp_path / "early")]) == 1
    assert "shows no run a-s0; run `rollway track" in capsys.readouterr().err
    assert main(["track", "--results", str(results), "--uri", uri]) == 0
    assert main(["export", "model", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert "speller version 1" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    [version] = client.search_model_versions("name = 'speller'")
    assert version.tags["rollway.policy"] == manifest.digest(results / "a-s0" / "r0002" / "policy.json")
    copy = client.download_artifacts(version.run_id, "model", str(tmp_path))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), copy
