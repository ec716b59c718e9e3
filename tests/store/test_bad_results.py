"""SQL and the terminal commands on folders that are empty, unfinished, old, damaged or hostile."""

import io
import json
import math
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from rollway.cli import main
from rollway.errors import RollwayError
from rollway.report import picture
from rollway.store import token_colours
from rollway.store.catalog import open_catalog, run_sql, with_catalog, write_database
from rollway.store.show import show
from rollway.store.views import documented
from rollway.terminal import prompt
from rollway.tracking.samples import samples
from store.synthetic import HOSTILE, make_results, rollout_rows, score, write, write_round, write_run_info

BYTES = "\x00\x07\x9b31m\u202e\ufffd"


def test_an_empty_folder_answers_every_documented_example_with_nothing(tmp_path: Path) -> None:
    for view in documented():
        with open_catalog(tmp_path) as catalog:
            for row in catalog.execute(view.example).fetchall():
                assert set(row) <= {None, 0}, view.name


@pytest.mark.parametrize("command", [["sql"], ["sql", "--list"], ["status", "--results"], ["table"]])
def test_commands_on_an_empty_folder(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [*command, str(tmp_path)] if command[-1] == "--results" else [*command, "--results", str(tmp_path)]
    assert main(given) in (0, 1)
    out, err = capsys.readouterr()
    assert out or err.startswith("rollway: error: ")
    assert "Traceback" not in err


def test_show_and_diff_on_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RollwayError, match="no rollouts have been written yet"):
        show(tmp_path, "x")
    assert main(["diff", "--results", str(tmp_path), "a-s0", "b-s0"]) == 1


def test_a_run_in_progress_and_a_missing_round(tmp_path: Path) -> None:
    """Round 0 is whole, round 1 lost its rollouts, round 2 has rollouts alone, half written files lie about."""
    make_results(tmp_path, {"grpo-s0": 2})
    for path in (tmp_path / "grpo-s0/r0001/p0").glob("rollouts-*.parquet"):
        path.unlink()
    write_round(tmp_path, "grpo-s0", 2, parts=("rollout",))
    (tmp_path / "grpo-s0/r0002/p0/.tmp-rollouts-002.parquet-7").write_bytes(b"PAR1")
    rows = json.loads(
        run_sql(tmp_path, "SELECT round, count(*) AS n, count(reward) AS r FROM scored GROUP BY 1 ORDER BY 1", "json")
    )
    assert rows == [{"round": 0, "n": 12, "r": 12}, {"round": 2, "n": 12, "r": 0}]
    assert "not scored yet" in show(tmp_path, "grpo-s0-2-0-0")
    for view in documented():
        run_sql(tmp_path, view.example)


@pytest.mark.parametrize("round", [0, 1, 2])
def test_a_score_file_of_an_older_schema(tmp_path: Path, round: int) -> None:
    """First, in the middle, or last: what it lacks is NULL, and the rest is as ever."""
    make_results(tmp_path, {"grpo-s0": 3})
    path = tmp_path / f"grpo-s0/r{round:04d}/p0/scores/exact-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["components", "error"]), path)
    query = """SELECT round, count(*) AS n, count(components) AS c, count(error) AS e FROM scores
        WHERE scorer = 'exact' GROUP BY 1 ORDER BY 1"""
    rows = json.loads(run_sql(tmp_path, query, "json"))
    assert rows == [{"round": r, "n": 12, "c": 0 if r == round else 12, "e": 0} for r in range(3)]
    assert "exact 1" in show(tmp_path, f"grpo-s0-{round}-0-0")
    assert main(["diff", "--results", str(tmp_path), "grpo-s0", "grpo-s0"]) == 0


def old_scores(results: Path, round: int) -> Path:
    """The scorer `exact` of one of three rounds as an older rollway wrote it."""
    make_results(results, {"grpo-s0": 3})
    path = results / f"grpo-s0/r{round:04d}/p0/scores/exact-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["components", "error"]), path)
    return results


@pytest.mark.parametrize("round", [0, 1, 2])
def test_every_command_reads_a_folder_with_a_file_of_an_older_schema(tmp_path: Path, round: int) -> None:
    results = old_scores(tmp_path / "results", round)
    out = ["--out", str(tmp_path / "out.jsonl")]
    for command in (
        ["report", "--out", str(tmp_path / "report.html")],
        ["table"],
        ["sql", "--list"],
        ["export", "rollouts", "grpo-s0", "--rounds", "0", "1", "2", *out],
        ["export", "rollouts", "grpo-s0", "--rounds", "0", "1", "2", "--as", "preference", *out],
    ):
        assert main([*command, "--results", str(results)]) == 0, command
    picture.curves_svg(results, tmp_path / "curves.svg")
    assert len(samples(results, "grpo-s0", 4)) == 4
    query = "SELECT count(*), count(components) FROM scores WHERE scorer = 'exact'"
    answers = iter([f"{query};", "SELECT count(error) FROM scores;"])

    def typed(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    prompt.run(results, read=typed)
    with duckdb.connect(str(write_database(results)), read_only=True) as client:
        assert client.execute(query).fetchone() == (36, 24)


@pytest.mark.parametrize("round", [0, 1, 2])
def test_columns_that_only_a_middle_file_has_are_not_lost(tmp_path: Path, round: int) -> None:
    make_results(tmp_path, {"grpo-s0": 3})
    for path in tmp_path.glob("grpo-s0/r*/p0/scores/*.parquet"):
        if path != tmp_path / f"grpo-s0/r{round:04d}/p0/scores/exact-000.parquet":
            pq.write_table(pq.read_table(path).drop_columns(["components", "error"]), path)
    query = "SELECT round, count(components) AS c FROM scores WHERE scorer = 'exact' GROUP BY 1 ORDER BY 1"
    assert json.loads(run_sql(tmp_path, query, "json")) == [{"round": r, "c": 12 * (r == round)} for r in range(3)]


def test_what_duckdb_cannot_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    with pytest.raises(RollwayError, match="the tables cannot be read: Conversion Error") as raised:
        with_catalog(tmp_path, lambda catalog: catalog.execute("SELECT CAST(300 AS TINYINT)").fetchall())
    assert "\n" not in str(raised.value)


def test_control_characters_and_hostile_text_stay_inert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_results(tmp_path, {"grpo-s0": 1}, text=HOSTILE + BYTES)
    outputs = [run_sql(tmp_path, "SELECT text FROM rollouts LIMIT 2"), show(tmp_path, "grpo-s0-0-0-0")]
    outputs.append(run_sql(tmp_path, "SELECT best_text, worst_text FROM best_worst"))
    for text in outputs:
        assert not any(c in text for c in "\x00\x07\x1b\x9b\u202e")
    assert "<script>" in outputs[0]
    for form in ("csv", "json", "jsonl"):
        assert "script" in run_sql(tmp_path, "SELECT text FROM rollouts LIMIT 1", form)


def test_names_and_roles_of_a_prompt_cannot_steer_a_terminal(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    path = tmp_path / "tasks/add/train.parquet"
    rows = [
        prompt
        | {"messages": json.dumps([{"role": "user\x1b[2J", "content": "a\nb"}]), "prompt_id": f"\x07train-{number}"}
        for number, prompt in enumerate(pq.read_table(path).to_pylist())
    ]
    write(path, rows, "prompts")
    for rollouts in tmp_path.glob("grpo-s0/r0000/p0/rollouts-*.parquet"):
        changed = [row | {"prompt_id": "\x07train-0"} for row in pq.read_table(rollouts).to_pylist()]
        write(rollouts, changed, "rollouts")
    shown = show(tmp_path, "grpo-s0-0-0-0")
    assert r"[user\x1b[2J] a" in shown
    assert r"prompt \x07train-0  task add  split train" in shown
    assert not any(c in shown for c in "\x07\x1b")


def test_csv_is_data_in_a_file_and_harmless_at_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    make_results(tmp_path, {"grpo-s0": 1}, text="one\x1b[2J\ntwo")
    query = ["sql", "--results", str(tmp_path), "--format", "csv", "SELECT text FROM rollouts LIMIT 1"]
    assert main(query) == 0
    assert capsys.readouterr().out == 'text\n"one\x1b[2J\ntwo"\n'
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(query) == 0
    assert capsys.readouterr().out == 'text\n"one\\x1b[2J\ntwo"\n'


def test_nan_rewards_and_metrics_do_not_stop_a_query(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    folder = tmp_path / "grpo-s0/r0000"
    scores = [
        score(row, "exact") | {"reward": math.nan if row["sample"] == 0 else 1.0} for row in rollout_rows("grpo-s0", 0)
    ]
    write(folder / "p0/scores/exact-000.parquet", scores, "scores")
    (folder / "batch.parquet").unlink()
    metrics = {"round": 0, "stage": "train", "metrics": [{"step": 1, "name": "loss", "value": None}]}
    (tmp_path / "grpo-s0/r0001/metrics.json").write_text(json.dumps(metrics))
    rows = json.loads(
        run_sql(tmp_path, "SELECT count(*) AS n, count(*) FILTER (isnan(reward)) AS bad FROM scored", "json")
    )
    assert rows == [{"n": 12, "bad": 3}]
    assert json.loads(run_sql(tmp_path, "SELECT value FROM metrics WHERE name = 'loss'", "json")) == [{"value": None}]
    for view in documented():
        run_sql(tmp_path, view.example)


def test_a_metrics_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    (tmp_path / "grpo-s0/r0001/metrics.json").write_text('{"round": 0, "metrics": [')
    with pytest.raises(RollwayError, match=r"metrics\.json"):
        run_sql(tmp_path, "SELECT * FROM metrics")
    assert "12" in run_sql(tmp_path, "SELECT count(*) FROM rollouts")


def test_a_rollout_of_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    count = 100_000
    row = rollout_rows("grpo-s0", 0)[0] | {
        "length": count,
        "tokens": [5, 6] * (count // 2),
        "logprobs": [-0.5] * count,
        "entropy": [0.25] * count,
        "train_mask": [True] * count,
        "segments": [{"start": 0, "end": count, "author": "policy", "turn": 0}],
        "text": "ab" * (count // 2),
    }
    write(tmp_path / "grpo-s0/r0000/p0/rollouts-000.parquet", [row], "rollouts")
    folder = tmp_path / "warmups/tiny-s0/weights/main"
    folder.mkdir(parents=True)
    Tokenizer(WordLevel({"<pad>": 0, "a": 5, "b": 6}, "<pad>")).save(str(folder / "tokenizer.json"))
    (folder.parents[1] / "policy.json").write_text(json.dumps({"policies": {"main": {"folder": "weights/main"}}}))
    started = time.process_time()
    shown = show(tmp_path, row["rollout_id"], colour=True, by="entropy")
    assert time.process_time() - started < 20
    assert f"{count - token_colours.MAX_COLOURED:,} more tokens" in shown
    query = "SELECT count(*) AS n, avg(position) AS p FROM tokens WHERE rollout_id = 'grpo-s0-0-0-0'"
    assert json.loads(run_sql(tmp_path, query, "json")) == [{"n": count, "p": (count - 1) / 2}]
    found = json.loads(run_sql(tmp_path, "SELECT max(repetition(tokens, 3)) AS r FROM rollouts", "json"))
    assert found == [{"r": pytest.approx(1 - 2 / (count - 2))}]


# ---- tokens in colour


def coloured(by: str, values: list[float], tokens: list[int], tokenizer: object) -> str:
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, color_system="truecolor", width=200, highlight=False)
    console.print(token_colours.coloured(by, tokens, values, tokenizer))
    return buffer.getvalue()


def test_tokens_are_coloured_by_their_value() -> None:
    tokenizer = Tokenizer(WordLevel({"sure": 0, "doubt\x1b[2J": 1, "guess": 2, "none": 3}, "sure"))
    shown = coloured("logprob", [-0.01, -1.2, -4.0, math.nan], [0, 1, 2, 3], tokenizer)
    assert shown.startswith("sure\x1b[30;43m doubt\\x1b[2J\x1b[0m")
    assert "\x1b[30;41m guess\x1b[0m\x1b[2m none" in shown
    for by, scale in token_colours.SCALES.items():
        limits = [limit for limit, _, _ in scale.bins]
        assert limits == sorted(limits) and limits[-1] == math.inf, by
        assert all(label in token_colours.legend(by).plain for _, _, label in scale.bins)


def test_pieces_join_to_the_text_and_characters_are_not_cut() -> None:
    """Byte tokens of one character go together; the joined pieces are what the whole decodes to."""
    text = "é→x😀!"
    tokens = list(text.encode())
    tokenizer = Tokenizer(WordLevel({f"<0x{n:02X}>": n for n in range(256)}, "<0x00>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = token_colours.pieces(tokenizer, tokens)
    assert "".join(pieces) == text
    assert pieces == ["", "é", "", "", "→", "x", "", "", "", "😀", "!"]


def test_what_is_not_stored_cannot_colour(tmp_path: Path) -> None:
    make_results(tmp_path, {"grpo-s0": 1})
    with pytest.raises(RollwayError, match=r"no entropies are stored.*entropy: true"):
        show(tmp_path, "grpo-s0-0-0-0", by="entropy")
    with pytest.raises(RollwayError, match="has no advantage"):
        show(tmp_path, "grpo-s0-0-2-0", by="advantage")
    with pytest.raises(RollwayError, match=r"policy\.json is not there, so ratios are not known"):
        show(tmp_path, "grpo-s0-0-0-0", by="ratio")
    assert " 0.5000" in show(tmp_path, "grpo-s0-0-0-0", by="advantage")


def test_a_fork_shows_what_it_took_over(tmp_path: Path) -> None:
    make_results(tmp_path, {"a-s0": 2})
    write_run_info(tmp_path, "f-s0", parent="a-s0", fork_round=1, fork_stage="score")
    assert "taken over from a-s0, which f-s0 forks" in show(tmp_path, "a-s0-0-0-0", run="f-s0")
    assert "taken over" not in show(tmp_path, "a-s0-0-0-0")
    with pytest.raises(RollwayError, match="run b-s0 has no rollout 'a-s0-0-0-0'; it is in a-s0, f-s0"):
        show(tmp_path, "a-s0-0-0-0", run="b-s0")
