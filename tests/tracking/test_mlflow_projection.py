import json
import os
import socket
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rollway.errors import RollwayError
from rollway.tracking.mlflow_projection import (
    DEFAULT_URI,
    GROUP,
    KEY,
    PARENT,
    _in_words,
    _without_password,
    collect,
    flatten,
    project,
    register_version,
)
from store.synthetic import make_results, write_evaluation, write_metrics, write_round, write_run_info

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """One database for all tests of this file: creating it takes seconds. Each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_results(tmp_path / "results", {"a-s0": 2})


def runs_of(uri: str, name: str):
    client = mlflow.tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id])
    return client, [run for run in found if KEY in run.data.tags]


def histories(uri: str, name: str):
    client, runs = runs_of(uri, name)
    return {
        (run.data.tags[KEY], key): [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for run in runs
        for key in run.data.metrics
    }


def test_what_is_projected(results, database, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    project(results, "a-s0", project="whole", uri=database, report=report)
    client, [run] = runs_of(database, "whole")
    assert run.info.run_name == "a-s0"
    assert run.data.tags["rollway.recipe"] == "grpo"
    assert run.data.params["train.optimizer.lr"] == "0.001"
    assert run.data.params["score.reward.format"] == "0.5"
    found = histories(database, "whole")
    assert found["a-s0", "eval/pass_at_1"] == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert found["a-s0", "curate/reward_mean"] == [(0, 0.5), (1, 1.5)]
    assert found["a-s0", "train/grad_norm"] == [(0, 2.5), (1, 3.5)]
    assert found["a-s0", "train/grad_norm.last"] == [(0, 3.0), (1, 4.0)]
    assert ("a-s0", "curate/groups_with_signal_share") not in found
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"run.json", "report.html", "plots"}
    datasets = {i.dataset.name: json.loads(i.dataset.profile)["num_rows"] for i in run.inputs.dataset_inputs}
    assert datasets == {"add-train": 3, "add-heldout": 3, "batch-r0000": 8, "batch-r0001": 8}
    assert run.info.status == "FINISHED"


def test_twice_is_the_same_as_once_whatever_the_file_times(results, database):
    digest = project(results, "a-s0", project="twice", uri=database)
    first = histories(database, "twice")
    _, [run] = runs_of(database, "twice")
    for path in results.rglob("*.json"):
        os.utime(path, (1, 1))
    assert project(results, "a-s0", project="twice", uri=database) == digest
    _, [again] = runs_of(database, "twice")
    assert again.info.run_id == run.info.run_id
    assert histories(database, "twice") == first
    assert len(again.inputs.dataset_inputs) == len(run.inputs.dataset_inputs)


def test_new_rounds_are_added_to_the_same_run(results, database):
    project(results, "a-s0", project="more", uri=database)
    _, [run] = runs_of(database, "more")
    write_round(results, "a-s0", 2)
    write_evaluation(results, "a-s0", 3)
    write_run_info(results, "a-s0", rounds=3)
    project(results, "a-s0", project="more", uri=database)
    _, [again] = runs_of(database, "more")
    # Round 2 had an evaluation only; now it has more figures: its digest changed, so the run was built anew.
    assert again.info.run_id != run.info.run_id
    assert histories(database, "more")["a-s0", "eval/pass_at_1"] == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    write_evaluation(results, "a-s0", 4)
    project(results, "a-s0", project="more", uri=database)
    _, [third] = runs_of(database, "more")
    assert third.info.run_id == again.info.run_id
    assert len(histories(database, "more")["a-s0", "eval/pass_at_1"]) == 5


def test_a_recomputed_round_leaves_no_ghosts(results, database):
    project(results, "a-s0", project="ghosts", uri=database)
    write_metrics(results / "a-s0" / "r0001" / "curate.json", 1, "curate", {"reward_mean": 9.0})
    project(results, "a-s0", project="ghosts", uri=database)
    _, [run] = runs_of(database, "ghosts")
    assert histories(database, "ghosts")["a-s0", "curate/reward_mean"] == [(0, 0.5), (1, 9.0)]
    project(results, "a-s0", project="ghosts", uri=database, rebuild=True)
    _, [rebuilt] = runs_of(database, "ghosts")
    assert rebuilt.info.run_id != run.info.run_id


def test_an_interrupted_projection_is_built_anew(results, database):
    project(results, "a-s0", project="broken", uri=database)
    client, [run] = runs_of(database, "broken")
    client.set_tag(run.info.run_id, "rollway.unfinished", "true")
    project(results, "a-s0", project="broken", uri=database)
    _, [again] = runs_of(database, "broken")
    assert again.info.run_id != run.info.run_id


def test_seeds_and_forks_are_runs_of_one_experiment(tmp_path, database):
    results = make_results(tmp_path / "results", {"a-s0": 2, "a-s1": 2})
    write_run_info(results, "f-s0", parent="a-s0", fork_round=1, fork_stage="score")
    for run in ("a-s0", "a-s1", "f-s0"):
        project(results, run, project="several", uri=database)
    found = histories(database, "several")
    assert {key[0] for key in found} == {"a-s0", "a-s1", "f-s0"}
    assert found["f-s0", "curate/reward_mean"] == [(0, 0.5)], "the parent's round before the fork"


def test_seeds_are_children_of_the_run_entry(tmp_path, database):
    results = make_results(tmp_path / "results", {"a-s0": 1, "a-s1": 1, "b-s0": 1})
    for run in ("a-s0", "a-s1", "b-s0", "a-s0"):
        project(results, run, project="family", uri=database)
    client, runs = runs_of(database, "family")
    parents = {
        run.info.run_id: run.info.run_name
        for run in client.search_runs([runs[0].info.experiment_id])
        if GROUP in run.data.tags
    }
    assert sorted(parents.values()) == ["a", "b"]
    assert {run.info.run_name: parents[run.data.tags[PARENT]] for run in runs} == {
        "a-s0": "a",
        "a-s1": "a",
        "b-s0": "b",
    }


def test_the_best_and_the_worst_rollouts_become_traces_once(results, database):
    project(results, "a-s0", project="traces", uri=database, traces=3)
    project(results, "a-s0", project="traces", uri=database, traces=3)
    client, [run] = runs_of(database, "traces")
    traces = client.search_traces(locations=[run.info.experiment_id])
    assert len(traces) == 3
    found = {trace.data.spans[0].name: trace.data.spans[0] for trace in traces}
    rewards = {name: span.attributes["reward"] for name, span in found.items()}
    assert sorted(rewards.values()) == [0.5, 7.0, 7.0] and all(name.startswith("a-s0-1-") for name in rewards)
    span = next(iter(found.values()))
    assert span.outputs == {"completion": "abc"} and span.inputs["messages"][0]["role"] == "user"
    assert {trace.info.request_metadata["mlflow.sourceRun"] for trace in traces} == {run.info.run_id}


def traces_of(uri, name):
    client, [run] = runs_of(uri, name)
    return run, client.search_traces(locations=[run.info.experiment_id])


def test_traces_of_the_last_round_take_the_place_of_earlier_ones(results, database):
    write_run_info(results, "b-s0")
    write_round(results, "b-s0", 0)
    project(results, "b-s0", project="latest", uri=database, traces=2)
    project(results, "a-s0", project="latest", uri=database, traces=3)
    write_round(results, "a-s0", 2)
    project(results, "a-s0", project="latest", uri=database, traces=3)
    project(results, "a-s0", project="latest", uri=database, traces=4, rebuild=True)
    client, runs = runs_of(database, "latest")
    run = next(run for run in runs if run.data.tags[KEY] == "a-s0")
    found = client.search_traces(locations=[run.info.experiment_id])
    by_run = {name: [t for t in found if t.info.tags["rollway.run"] == name] for name in ("a-s0", "b-s0")}
    assert [len(of) for of in by_run.values()] == [4, 2], "another run's traces stay"
    assert {trace.info.tags["rollway.round"] for trace in by_run["a-s0"]} == {"2"}
    assert {trace.info.request_metadata["mlflow.sourceRun"] for trace in by_run["a-s0"]} == {run.info.run_id}


def test_where_tracing_fails_the_run_is_built_anew(results, database, monkeypatch):
    def refuse(*args):
        raise mlflow.exceptions.MlflowException("no room\nand more")

    with monkeypatch.context() as patched:
        patched.setattr("rollway.tracking.mlflow_projection.log_traces", refuse)
        with pytest.raises(RollwayError, match=r"^MLflow at sqlite:.*: no room\. What was computed is there"):
            project(results, "a-s0", project="refused", uri=database, traces=2)
    project(results, "a-s0", project="refused", uri=database, traces=2)
    run, found = traces_of(database, "refused")
    assert len(found) == 2
    assert "rollway.unfinished" not in run.data.tags


def test_a_server_that_is_not_there_is_one_sentence(results, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound and not listened on: every connection is refused
        uri = f"http://user:secret@127.0.0.1:{port}"
        with pytest.raises(RollwayError, match=f"^MLflow at http://127.0.0.1:{port}: ") as raised:
            project(results, "a-s0", project="nowhere", uri=uri)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_that_is_not_shown_is_told_of_without_the_servers_password(tmp_path, monkeypatch):
    class Empty:
        def __init__(self, **_):
            pass

        def search_experiments(self):
            return []

        def search_runs(self, *_):
            return []

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Empty)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:sec/r@et@host:5000/ml")
    with pytest.raises(RollwayError, match=r"^http://host:5000/ml: shows no run a-s0; run `rollway track") as raised:
        register_version(tmp_path, "a-s0", "m", DEFAULT_URI, {})
    assert "sec" not in str(raised.value) and "user" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h/x and http://u:p/q@h", "http://h/x and http://h"),
        ("postgresql://me:a/b@c@host:5432/db", "postgresql://host:5432/db"),
        ("https://token@host", "https://host"),
        ("sqlite:///x.db: no room", "sqlite:///x.db: no room"),
        ("http://host:5000/a", "http://host:5000/a"),
        ("postgresql://u:p@h/db?password=abc", "postgresql://h/db"),
        ("http://h/?token=abc", "http://h/"),
        ("http://h/ml?token=abc&x=1 is not there (http://h?key=abc)", "http://h/ml is not there (http://h)"),
        ("http://h/ml#token=abc", "http://h/ml"),
        ("no '//user:p ass@host' here", "no '//host' here"),
        ("postgresql://me:a b/c@d e@host:5432/db", "postgresql://host:5432/db"),
        ("http://u:p q@h/x and http://u:p/q r@h", "http://h/x and http://h"),
        ("http://host:5000/a or http://host: ask me@home?", "http://host:5000/a or http://home"),
        ("http://host:5000 is down, ask me@home", "http://host:5000 is down, ask me@home"),
    ],
)
def test_addresses_are_told_without_user_password_and_query(text, shown):
    assert _without_password(text) == shown


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://my user:p:a s?s@host/db?password=a b", "postgresql://host/db"),
        ("http://host/ml?token=a b", "http://host/ml"),
        ("sqlite:///a b.db", "sqlite:///a b.db"),
    ],
)
def test_of_the_address_itself_it_is_known_where_it_ends(uri, shown):
    with pytest.raises(RollwayError) as raised, _in_words(uri):
        raise OSError(f"no such place: {uri}, nor\n a second line")
    assert str(raised.value).startswith(f"MLflow at {shown}: no such place: {shown}, nor. What")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9/?token=s3cretpw99", "(url: /?token=s3cretpw99) refused"),
        ("http://h/ml?a=1&key=s3cret%2Fpw99", "with s3cret/pw99 and s3cret%2Fpw99"),
        ("http://h/ml?s3cretpw99", "asked for s3cretpw99"),
        ("http://h/ml#s3cretpw99", "at #s3cretpw99"),
        ("postgresql://bob:s3cretpw99@h/db", 'FATAL: no such password "s3cretpw99"'),
        ("postgresql://bob:s3cret/pw99@h/db", "bad password s3cret/pw99"),
        ("postgresql://bob:s3cret%2Fpw99@h/db", "bad password s3cret/pw99"),
        ("https://s3cret0123456789@h/x", "401 for user s3cret0123456789"),
    ],
)
def test_messages_that_repeat_a_part_of_the_address_do_not_repeat_its_secret(uri, said):
    with pytest.raises(RollwayError) as raised, _in_words(uri):
        raise OSError(said)
    assert "s3cret" not in str(raised.value) and "***" in str(raised.value)


def test_words_that_are_no_secrets_stay():
    with (
        pytest.raises(RollwayError, match=r"bob1host: require a \*\*\*") as raised,
        _in_words("postgresql://me:bob1@bob1host/db?sslmode=require"),
    ):
        raise OSError("bob1host: require a bob1")
    assert "sslmode" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "module"),
    [("postgresql://bob:pw@localhost/db", "psycopg2"), ("mysql+pymysql://bob:pw@localhost/db", "pymysql")],
)
def test_a_driver_that_is_missing_is_named(results, uri, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RollwayError, match=rf"localhost/db needs the Python module {module}, which is not installed"):
        project(results, "a-s0", project="p", uri=uri)


def test_what_stages_cost_is_logged_on_request(results, database):
    for name, seconds in (("r0000/score-p0-exact-000", 0.5), ("r0000/score-p0-format-000", 0.25), ("r0001/train", 2.0)):
        path = results / "logs" / "a-s0" / f"{name}.usage.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "cpu_seconds": seconds, "peak_rss_mb": 100 * seconds}))
    project(results, "a-s0", project="usage", uri=database, usage=True)
    found = histories(database, "usage")
    assert found["a-s0", "usage/score/seconds"] == [(0, 0.75)]
    assert found["a-s0", "usage/score/peak_rss_mb"] == [(0, 50.0)]
    assert found["a-s0", "usage/train/seconds"] == [(0, 2.0)], "the train job of round 0 makes policy 1"


def test_the_environment_names_the_server_where_the_config_does_not(results, database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    project(results, "a-s0", project="environment", uri="sqlite:///mlflow.db")
    assert len(runs_of(database, "environment")[1]) == 1
    other = database.replace("mlflow.db", "other.db")
    project(results, "a-s0", project="elsewhere", uri=other)
    assert mlflow.tracking.MlflowClient(database).get_experiment_by_name("elsewhere") is None


def test_without_mlflow_there_is_a_notice(results, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert project(results, "a-s0", project="p", uri="sqlite:///x.db") == collect(results, "a-s0").digest()
    assert "mlflow is not installed" in capsys.readouterr().err


def test_an_empty_run_is_projected_too(tmp_path, database):
    write_run_info(tmp_path, "a-s0")
    project(tmp_path, "a-s0", project="empty", uri=database)
    _, [run] = runs_of(database, "empty")
    assert run.data.metrics == {}


def curves_of(client, run, folder):
    [artifact] = client.list_artifacts(run.info.run_id, "plots")
    return ElementTree.parse(client.download_artifacts(run.info.run_id, artifact.path, str(folder))).getroot()


def test_the_curves_are_pictures_of_the_seed_and_of_all_seeds(tmp_path, database):
    results = make_results(tmp_path / "results", {"a-s0": 2, "a-s1": 2, "b-s0": 2})
    for run in ("a-s0", "a-s1", "b-s0"):
        project(results, run, project="plots", uri=database)
    client, runs = runs_of(database, "plots")
    child = next(run for run in runs if run.info.run_name == "a-s0")
    parent = client.get_run(child.data.tags[PARENT])
    size = [curves_of(client, child, tmp_path).get(name) for name in ("width", "height", "viewBox")]
    assert size[2] == f"0 0 {size[0]} {size[1]}", "without a size of its own MLflow's page does not show it"
    titles = {title.text for title in curves_of(client, child, tmp_path).iterfind(".//{*}title")}
    assert "a, round 1: 0.5 [0.4, 0.6]" in titles
    texts = [text.text for text in curves_of(client, child, tmp_path).iterfind(".//{*}text")]
    assert {"held-out pass@1", "reward", "gradient norm", "a"} <= set(texts)
    assert "b" not in texts
    lines = [line.get("class") for line in curves_of(client, parent, tmp_path).iterfind(".//{*}polyline")]
    assert lines.count("line seed c0") == 2 * lines.count("line mean c0") > 0


def test_flatten():
    assert flatten({"a": {"b": [1, 2], "c": None}, "d": "x", "e": {}}) == {
        "a.b": "[1, 2]",
        "a.c": "null",
        "d": "x",
        "e": "{}",
    }
    assert flatten({}) == {}
