"""What rollway loads and ships: no pickle, no code of models, licences known, secrets refused."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rollway.config import load_experiment
from rollway.config.base import ConfigError
from rollway.config.policies import HuggingFacePolicy
from rollway.config.recipes import load_recipe, parse, read_yaml
from rollway.config.secrets import refuse_secrets
from supply.licences import licence, needed, page

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("src", "benchmarks", "notebooks") for path in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"}


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def dotted(node: ast.AST) -> str:
    match node:
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}"
        case ast.Name(id=name):
            return name
        case _:
            return ""


def pickling(path: Path) -> list[str]:
    """What in a source file reads or writes pickles."""
    found = []
    for node in nodes(path):
        match node:
            case ast.Import(names=names):
                found += [n.name for n in names if n.name.partition(".")[0] in UNPICKLING]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLING:
                found.append(module)
            case ast.Call(func=function, keywords=keywords):
                found += [dotted(function)] if dotted(function) in CALLS else []
                found += ["allow_pickle" for k in keywords if k.arg == "allow_pickle"]
                found += ["weights_only" for k in keywords if k.arg == "weights_only"]
    return found


def test_no_source_reads_or_writes_pickles() -> None:
    assert len(SOURCES) > 150
    assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := pickling(path))} == {}


def test_pickles_would_be_found(tmp_path: Path) -> None:
    code = ["import pickle", "from multiprocessing import Pool", "torch.load('x')", "np.load('x', allow_pickle=True)"]
    (tmp_path / "bad.py").write_text("\n".join(code))
    assert pickling(tmp_path / "bad.py") == ["pickle", "multiprocessing", "torch.load", "allow_pickle"]


def loading(path: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """Calls of from_pretrained and the like, with their keywords."""
    calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
    named = [(dotted(call.func), {k.arg: k.value for k in call.keywords if k.arg}) for call in calls]
    return [(name, keywords) for name, keywords in named if name.endswith(".from_pretrained")]


def test_models_are_loaded_from_safetensors_and_bring_no_code() -> None:
    seen = 0
    for path in SOURCES:
        for name, keywords in loading(path):
            seen += 1
            trusted = keywords.get("trust_remote_code")
            plain = trusted is None or (isinstance(trusted, ast.Constant) and trusted.value is False)
            assert plain or dotted(trusted).endswith(".trust_remote_code"), f"{path}: {name}"
            if re.search(r"Model\w*\.from_pretrained$", name) and "Auto" in name:
                safe = keywords.get("use_safetensors")
                assert isinstance(safe, ast.Constant) and safe.value is True, f"{path}: {name} may read pickles"
    assert seen >= 8
    constants = [
        path
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        if isinstance(node.value, ast.Constant) and node.value.value is not False
    ]
    assert constants == []


def test_no_config_or_recipe_trusts_code() -> None:
    for path in sorted((ROOT / "config").rglob("*.yaml")):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path


def test_code_of_a_model_is_off_and_only_runs_where_it_is_pinned() -> None:
    assert HuggingFacePolicy(name="some/model").trust_remote_code is False
    for revision in (None, "main", "v1.0", "abc"):
        with pytest.raises(ConfigError, match="pin `revision` to the commit"):
            parse(HuggingFacePolicy, {"name": "some/model", "trust_remote_code": True, "revision": revision}, "policy")
    assert HuggingFacePolicy(name="some/model", trust_remote_code=True, revision="a" * 40).trust_remote_code
    assert HuggingFacePolicy(name="./model", trust_remote_code=True).trust_remote_code


def test_the_page_of_licences_has_what_is_installed() -> None:
    """Other machines may have less or more by platform; what is here stands there, as it is."""
    written = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    rows = {line for line in page().splitlines() if line.startswith("| ")}
    assert [row for row in sorted(rows) if row not in written.splitlines()] == [], "run `make docs`"
    assert "torch" in needed() and needed()["torch"]


def test_every_licence_is_known_and_none_forbids_the_use() -> None:
    assert [name for name in needed() if licence(name) in ("", "not stated", "UNKNOWN")] == []
    # Of several licences one may be chosen.
    choices = {name: licence(name).split(" or ") for name in needed()}
    strict = re.compile(r"AGPL|Affero|(?<!L)GPL(?!.*exception)|Proprietary")
    assert [name for name, stated in choices.items() if all(map(strict.search, stated))] == []


def test_rollways_own_licence_is_there_and_shipped() -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license = "MIT"' in settings
    assert 'license-files = ["LICENSE"]' in settings


SECRETS = [
    "sk-" + "proj-" + "a1B2" * 8,
    "hf_" + "A" * 34,
    "ghp_" + "b" * 36,
    "AKIA" + "C" * 16,
    "glpat-" + "d" * 20,
    "xoxb-" + "1" * 12,
    "eyJ" + "e" * 20 + "." + "f" * 20 + ".x",
    "-----BEGIN RSA PRIVATE KEY-----\nMII",
    "postgresql://me:word@host/db",
    "see https://user:pass@host/v1 for it",
    "postgres://me:pa/ss/word@host/db",
    "https://tokenonly@host/x",
    "postgresql://" + "t" * 24 + "@host/db",
    "http://host/v1?api_key=abc",
    "http://host/v1?x=1&X-Amz-Signature=abc",
    "Authorization: Bearer abcdefgh",
    "bearer " + "a1" * 10,
    "Bearer 0123456789abcdef",
    "bearer mF_9.B5f-4.1JqM7xYz",
    "BEARER 550e8400-e29b-41d4-a716-446655440000",
    "bearer dGhpcyBpcyBhIHRva2VuIQ==",
    "sk_live_" + "g" * 24,
    "pypi-" + "h" * 20,
    "https://hooks.slack.com/services/T0/B0/x",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQ",
    "GOCSPX-" + "i" * 28,
    "whsec_" + "j" * 32,
    "pplx-" + "k" * 40,
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("place", ["value", "unknown key's value", "list", "key"])
def test_what_looks_like_a_secret_is_refused_and_not_repeated(secret: str, place: str, tmp_path: Path) -> None:
    config: dict[str, Any] = read_yaml(ROOT / "config/config.yaml")
    match place:
        case "value":
            config["mlflow"] = {"uri": secret}
        case "unknown key's value":
            config["mlfow"] = {"uri": secret}
        case "list":
            config["defaults"] = {**config.get("defaults", {}), "rollout": {"sampling": {"stop": ["x", secret]}}}
        case "key":
            config["runs"][secret] = {"recipe": "grpo"}
    with pytest.raises(ConfigError, match="leave it in the environment") as caught:
        load_experiment(config)
    assert secret not in str(caught.value)
    assert secret.splitlines()[0] not in str(caught.value)


def test_values_of_the_environment_that_are_secrets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "correct-horse-battery")
    monkeypatch.setenv("EDITOR", "correct-horse")
    with pytest.raises(ConfigError, match=r"config: `runs\.a\.prompt` holds the value of MY_JUDGE_KEY") as caught:
        refuse_secrets({"runs": {"a": {"prompt": "say correct-horse-battery"}}}, "config")
    assert "correct-horse-battery" not in str(caught.value)
    refuse_secrets({"runs": {"a": {"prompt": "say correct-horse"}}}, "config")


@pytest.mark.parametrize(
    "name",
    [
        "MY_PASS",
        "SSHPASS",
        "PGPASSWORD",
        "DB_PWD",
        "KEY_FILE_PASSPHRASE",
        "AUTH",
        "HTTP_AUTH",
        "SLACK_WEBHOOK_URL",
        "OPENAI_KEY_1",
        "APIKEY",
    ],
)
def test_names_of_the_environment_that_say_what_they_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "123456789012")
    for held in ("by 123456789012", 123456789012):
        with pytest.raises(ConfigError, match=f"the value of {name}"):
            refuse_secrets({"x": held}, "config")


def test_folders_of_the_environment_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD", "SSH_ASKPASS", "SSH_AUTH_SOCK", "MAX_TOKENS_PATH"):
        monkeypatch.setenv(name, "/somewhere/else")
    refuse_secrets({"x": "/somewhere/else/file"}, "config")


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "API-KEY",
        "openai_api_key",
        "access_key",
        "secret",
        "client_secret",
        "password",
        "db_password",
        "smtp_pass",
        "passphrase",
        "hf_token",
        "access_token",
        "authorization",
        "credentials",
        "token",
        "passwords",
        "api_keys",
        "clientSecrets",
        "access_tokens",
    ],
)
def test_texts_under_names_of_secrets_are_refused(name: str) -> None:
    held = {"score": {"scorers": {"m": {"kind": "python", "params": {"deep": [{name: "hunter2hunter2"}]}}}}}
    with pytest.raises(ConfigError, match=rf"params\.deep\.0\.{name}` holds what its name says") as caught:
        refuse_secrets(held, "config")
    assert "hunter2" not in str(caught.value)
    refuse_secrets({name: ""}, "config")
    refuse_secrets({name: None}, "config")


def test_names_that_only_sound_like_it() -> None:
    names = (
        "tokenizer max_tokens pad_token eos_token stop_token key_env sort_key keys passes pass_at first_pass_at author"
    )
    refuse_secrets(dict.fromkeys(names.split(), "hunter2hunter2"), "config")
    refuse_secrets({"token": "<eos_of_text>", "auth": "basic", "url": "http://h/v1?model=token&max_tokens=3"}, "config")


def test_tasks_runs_and_scorers_may_be_called_what_they_like() -> None:
    config = read_yaml(ROOT / "config/config.yaml")
    [(task, asked)], [(warmup, taught)] = config["tasks"].items(), config["warmups"].items()
    config["tasks"] = {"secrets": asked, task: asked}
    config["warmups"] = {"secret": taught, warmup: taught}
    score = {"scorers": {"secret": {"kind": "exact"}}, "reward": {"secret": 1}, "correct": "secret"}
    step = {"from": 1, "score": {"scorers": {"password": {"kind": "exact"}}}}
    config["runs"] = {
        "secret": {"recipe": "grpo", "task": "secrets", "warmup": "secret", "score": score, "schedule": [step]}
    }
    load_experiment(config)
    for held in (
        {"runs": {"secret": "hunter2hunter2"}},
        {"runs": {"secret": {"secret": "hunter2hunter2"}}},
        {"tasks": {"a": {"source": {"secret": "hunter2hunter2"}}}},
        {"defaults": {"score": {"scorers": {"secret": "hunter2hunter2"}}}},
        {"defaults": {"score": {"scorers": {"a": {"params": {"tasks": {"secret": {"x": "hunter2hunter2"}}}}}}}},
    ):
        with pytest.raises(ConfigError, match=r"secret(\.x)?` holds what its name says"):
            refuse_secrets(held, "config")


def test_whole_numbers_count_more_often_than_they_are_secrets() -> None:
    refuse_secrets({"params": {"second_pass": 2, "pass": 10_000_000, "secret": 3}, "x": {"pass": 1}}, "config")
    refuse_secrets({"params": {"session_tokens": 100_000}, "score": {"reward": {"secret": 0.333333}}}, "config")
    for name in ("password", "client_secret", "pwd"):
        with pytest.raises(ConfigError, match=f"params.{name}` holds what its name says"):
            refuse_secrets({"params": {name: 19700101}}, "config")
        with pytest.raises(ConfigError, match=f"params.{name}` holds what its name says"):
            refuse_secrets({"params": {name: 1234567.5}}, "config")
    with pytest.raises(ConfigError, match=r"second_pass` holds what its name says"):
        refuse_secrets({"params": {"second_pass": "19700101"}}, "config")


def test_a_recipe_file_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: grpo\ntitle: {SECRETS[1]}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: `title` holds an access token"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_ordinary_texts_are_no_secrets() -> None:
    texts = ["a" * 40, "task-" + "a" * 30, "http://localhost:8000/v1", "https://host/a:b@c", "sqlite:///x.db", "sk-1"]
    texts += ["ssh://git@host/x", "http://host:8000/v1/@me", "https://host/?to=a@b", "the bearer of responsibilities"]
    texts += ["Write to http://a@b.c for it", "ssh://git@host/x", "https://git@host/x", "https://alice@host"]
    texts += ["bearer certificate2024-issue", "a bearer Certificate_of-Deposit12", "bearer 2024/certificates/issue"]
    refuse_secrets({"x": texts, "revision": "0123456789abcdef" * 2 + "01234567"}, "config")
    for path in sorted((ROOT / "config").rglob("*.yaml")):
        read_yaml(path)


def test_the_tests_themselves_name_no_path_of_a_machine() -> None:
    """No committed page tells where it was made."""
    home = str(Path.home())
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    wrong = [path.name for path in pages if f"{home}/" in path.read_text(encoding="utf-8")]
    assert wrong == []
    assert sys.prefix not in (ROOT / "docs/licences.md").read_text(encoding="utf-8")
