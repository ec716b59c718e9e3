"""Bad SQL, parameters and rows get one sentence that names the file, the key or the row; SQL sees only `scored`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curation.tables import column, scored_table
from rollway.config.curation import CURATE_STEPS, STEP_FOLDERS, CurateConfig
from rollway.curation import count_groups, curate, plan
from rollway.curation.sql_file import parse, read_step
from rollway.errors import RollwayError

SCORED = scored_table([[1, 0, 0], [1, 1, 0]])
Curate = Callable[..., pa.Table]


@pytest.fixture
def own(tmp_path: Path) -> Curate:
    """Curates with an SQL text of one's own as one step, after further steps by keyword."""

    def call(step: str, text: str, scored: pa.Table = SCORED, params: dict[str, Any] | None = None, **parts: Any):
        path = tmp_path / "mine.sql"
        path.write_text(text)
        return curate(scored, CurateConfig.model_validate({**parts, step: {"sql": str(path), **(params or {})}}))

    return call


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(RollwayError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("COPY (SELECT 1) TO '/tmp/x'", ["COPY", "exactly one SELECT"]),
        ("ATTACH '/tmp/x.duckdb'", ["ATTACH", "exactly one SELECT"]),
        ("INSTALL httpfs", ["exactly one SELECT"]),
        ("LOAD httpfs", ["LOAD", "exactly one SELECT"]),
        ("SET enable_external_access = true", ["SET", "exactly one SELECT"]),
        ("PRAGMA threads=4", ["exactly one SELECT"]),
        ("CREATE TABLE t AS SELECT 1", ["CREATE", "exactly one SELECT"]),
        ("DROP TABLE scored", ["DROP", "exactly one SELECT"]),
        ("SELECT rollout_id FROM scored; SELECT 1", ["2 statements"]),
        ("-- nothing", ["0 statements"]),
        ("WITH gone AS (DELETE FROM scored RETURNING *) SELECT rollout_id FROM gone", ["DELETE"]),
        ("SELECT rollout_id FROM read_csv('/etc/passwd')", ["sees only `scored`"]),
        ("SELECT rollout_id FROM read_text('/etc/passwd')", ["sees only `scored`"]),
        ("SELECT rollout_id FROM read_parquet('/etc/*')", ["sees only `scored`"]),
        ("SELECT rollout_id FROM glob('/etc/*')", ["sees only `scored`"]),
        ("SELECT rollout_id FROM '/etc/passwd'", ["/etc/passwd does not exist"]),
        ("SELECT rollout_id FROM scored WHERE random() < 0.5", ["random()", "md5_number_lower"]),
        ("SELECT rollout_id FROM scored WHERE now() > '2020-01-01'", ["now()"]),
        ("SELECT rollout_id FROM scored_python", ["scored_python does not exist"]),
    ],
)
def test_sql_can_only_read_scored(own: Curate, text: str, words: list[str]) -> None:
    scored_python = SCORED
    refused(lambda: own("filter", text), "mine.sql", *words)
    assert scored_python.num_rows == 6


@pytest.mark.parametrize(
    ("step", "text", "words"),
    [
        ("filter", "SELECT rollout_id\nFROM scored WHER reward > 0", ["syntax error", "(line 2"]),
        ("advantage", "SELECT rollout_id, entropy AS advantage FROM scored", ["entropy", "group_id, sample", "line 1"]),
        ("advantage", "SELECT reward AS advantage FROM scored", ["lacks the column rollout_id"]),
        ("advantage", "SELECT rollout_id, reward FROM scored", ["lacks the column advantage"]),
        ("weight", "SELECT rollout_id, 1 AS weight, 2 AS mass FROM scored", ["mass", "nothing reads"]),
        ("advantage", "SELECT rollout_id, 'high' AS advantage FROM scored", ["VARCHAR", "not a number"]),
        ("advantage", "SELECT rollout_id, 0.0::DOUBLE / 0.0 AS advantage FROM scored", ["advantage", "r00-0"]),
        ("advantage", "SELECT rollout_id, 'inf'::DOUBLE AS advantage FROM scored", ["advantage is inf", "r00-0"]),
        ("advantage", "SELECT rollout_id, NULL::DOUBLE AS advantage FROM scored", ["advantage is NULL", "6 rows"]),
        ("route", "SELECT rollout_id, NULL AS route FROM scored", ["route is NULL"]),
        (
            "advantage",
            "SELECT 'x' || rollout_id AS rollout_id, 1 AS advantage FROM scored",
            ["xr00-0", "not in `scored`"],
        ),
        ("filter", "SELECT NULL::VARCHAR AS rollout_id FROM scored LIMIT 1", ["not in `scored`"]),
        ("advantage", "SELECT rollout_id, 1 AS advantage FROM scored WHERE correct", ["3 of 6", "allows: drops"]),
        ("weight", "SELECT rollout_id, 1 AS weight FROM scored WHERE correct", ["3 of 6", "allows: drops"]),
        ("filter", "SELECT a.rollout_id FROM scored a JOIN scored b USING (group_id)", ["3 times", "join"]),
        ("select", "SELECT a.rollout_id FROM scored a, scored b", ["6 times", "allows: repeats"]),
        ("pair", "SELECT rollout_id, group_id AS pair_id, 'chosen' AS role FROM scored", ["pair g00", "one chosen"]),
        (
            "pair",
            "-- allows: repeats\n"
            "SELECT rollout_id, rollout_id AS pair_id, unnest(['chosen', 'rejected']) AS role FROM scored",
            ["pair r00-0"],
        ),
        ("filter", "-- allows: repeats\nSELECT rollout_id FROM scored", ["line 1", "not possible in a filter file"]),
        ("weight", "-- allows: everything\nSELECT rollout_id, 1 AS weight FROM scored", ["line 1", "allows: repeats"]),
    ],
)
def test_bad_sql(own: Curate, step: str, text: str, words: list[str]) -> None:
    refused(lambda: own(step, text), "mine.sql", *words)


def test_a_file_may_drop_or_repeat_where_it_says_so(own: Curate) -> None:
    kept = own("advantage", "-- allows: drops\nSELECT rollout_id, 2 AS advantage FROM scored WHERE correct")
    assert column(kept, "advantage") == [2, 2, 2]
    twice = own("select", "-- allows: repeats\nSELECT rollout_id FROM scored, range(2) WHERE correct;")
    assert list(zip(column(twice, "rollout_id"), column(twice, "slot"), strict=True)) == [
        (name, slot) for name in ("r00-0", "r01-0", "r01-1") for slot in (0, 1)
    ]
    text = "SELECT rollout_id, slot FROM scored WHERE pair_id LIKE 'g00%' AND role = 'chosen'"
    assert own("select", text, pair={"sql": "all_pairs"}).num_rows == 3
    refused(lambda: own("select", "SELECT rollout_id FROM scored", pair={"sql": "all_pairs"}), "lacks the column slot")


def test_later_steps_see_earlier_results(own: Curate) -> None:
    text = "SELECT rollout_id FROM scored WHERE advantage > 0 AND weight < 1 AND route = 'right' AND reward = 1"
    batch = own(
        "select",
        text,
        advantage={"sql": "grpo"},
        weight={"sql": "pf_ppo", "keep": "br"},
        route={"sql": "correctness"},
        reward={"sql": "threshold", "threshold": 0.5},
    )
    assert column(batch, "rollout_id") == ["r00-0", "r01-0", "r01-1"]
    tokens = own("advantage", "SELECT rollout_id, 1 AS advantage, [1.5, 2] AS token_advantage FROM scored")
    assert column(tokens, "token_advantage")[0] == [1.5, 2.0]


@pytest.mark.parametrize(
    ("header", "params", "words"),
    [
        ("-- param k: double, power", {}, ["curate.filter.k", "missing", "power"]),
        ("-- param k: double, power", {"k": "two"}, ["curate.filter.k", "'two'", "double"]),
        ("-- param k: double, power", {"k": True}, ["curate.filter.k", "True"]),
        ("-- param k: int, power", {"k": 1.5}, ["curate.filter.k", "int"]),
        ("-- param k: int=1 [0|1], power", {"k": 2}, ["curate.filter.k", "one of 0, 1"]),
        ("-- param k: int=3 [0|1], power", {}, ["line 1", "default 3"]),
        ("-- param k: double=1, power", {"kk": 2.0}, ["curate.filter.kk", "did you mean k"]),
        ("-- param k: float, power", {"k": 1.0}, ["line 1", "double, int, bool, string"]),
        ("-- param k double", {"k": 1.0}, ["line 1", "-- param NAME"]),
        ("-- param k: bool=yes, power", {}, ["line 1", "neither true nor false"]),
        ("-- param k: int, power\n-- param k: int, power", {"k": 1}, ["line 2", "twice"]),
        ("-- param k: int=1, power\n-- param m: int=1, unused", {}, ["param m", "never uses $m"]),
        ("-- no header", {}, ["uses $k", "-- param k"]),
        ("-- param k: double=0.5 [0, 1), share", {"k": 1.0}, ["curate.filter.k: 1.0 is not in [0, 1)", "share"]),
        ("-- param k: double=0.5 [0, 1), share", {"k": -0.1}, ["-0.1 is not in [0, 1)"]),
        ("-- param k: double=0.5 (0, 1], share", {"k": 0}, ["curate.filter.k: 0 is not in (0, 1]"]),
        ("-- param k: double=0.5 (0, 1], share", {"k": float("nan")}, ["curate.filter.k: nan is not in (0, 1]"]),
        ("-- param k: int [1, inf), count", {"k": 0}, ["curate.filter.k: 0 is not in [1, inf)"]),
        ("-- param k: int=0 [1, inf), count", {}, ["line 1", "default 0 is not in [1, inf)"]),
        ("-- param k: int [2, 1], count", {}, ["line 1", "the range [2, 1] is empty"]),
        ("-- param k: int [a, 1], count", {}, ["line 1", "'a'"]),
        ("-- param k: string [0, 1], count", {}, ["line 1", "a string has no range"]),
        ("-- param k: double when m=1, power", {}, ["parameter k depends on m", "no `-- param` line declares"]),
        (
            "-- needs: curate.horizon\n-- param k: int, power",
            {"k": 1},
            ["line 1", "write `-- needs: curate.replay >= "],
        ),
        ("-- needs: curate.replay >= m\n-- param k: int, power", {"k": 1}, ["declares no `-- param m: int"]),
    ],
)
def test_bad_parameters(own: Curate, header: str, params: dict[str, Any], words: list[str]) -> None:
    text = f"{header}\nSELECT rollout_id FROM scored WHERE reward < $k"
    refused(lambda: own("filter", text, params=params), "mine.sql", *words)


SWITCHED = """-- param on: bool=false, switch
-- param k: double{} [0, 5] when on=true, bound
SELECT rollout_id FROM scored WHERE NOT $on OR reward < $k
"""


def test_parameters_without_effect_beside_others_are_refused(own: Curate) -> None:
    """Needed where the other has the value that makes them act, refused where not; null takes one back."""
    needed, usual = SWITCHED.format(""), SWITCHED.format("=1")
    assert [own("filter", text).num_rows for text in (needed, usual)] == [6, 6]
    assert own("filter", needed, params={"k": None}).num_rows == 6
    assert own("filter", needed, params={"k": 1, "on": True}).num_rows == 3
    assert own("filter", usual, params={"on": True}).num_rows == 3
    for text in (needed, usual):
        refused(
            lambda text=text: own("filter", text, params={"k": 1}), "curate.filter.k: has no effect unless on is true"
        )
    refused(lambda: own("filter", needed, params={"on": True}), "curate.filter.k: is missing")
    refused(lambda: own("filter", needed, params={"on": True, "k": 6}), "6 is not in [0, 5]")
    bad = {"on=maybe": "neither true nor false", "k=1": "depends on another itself"}
    for when, words in bad.items():
        refused(lambda when=when: own("filter", needed.replace("on=true", when)), "parameter k depends on", words)


def test_a_bottom_needs_its_bound() -> None:
    draw = {"sql": "threshold", "keep": "top_bottom", "high": 0.5}
    refused(lambda: plan(CurateConfig.model_validate({"weight": draw})), "curate.weight.low: is missing")
    top = {**draw, "keep": "top", "low": 0.0}
    refused(
        lambda: plan(CurateConfig.model_validate({"weight": top})), "curate.weight.low: has no effect unless keep is"
    )


def test_parameters_reach_the_sql(own: Curate) -> None:
    header = "-- param least: double=0.5, bound\n-- param on: bool=true, switch\n"
    text = header + "SELECT rollout_id FROM scored WHERE reward >= $least AND $on"
    assert own("filter", text).num_rows == 3
    assert own("filter", text, params={"least": 0}).num_rows == 6
    assert own("filter", text, params={"on": False}).num_rows == 0


def test_given_values_and_horizon() -> None:
    draw = {"weight": {"sql": "pf_ppo", "keep": "br"}, "select": {"sql": "resample"}}
    refused(lambda: curate(SCORED, CurateConfig.model_validate(draw)), "curate.select.seed", "resample.sql")
    config = CurateConfig.model_validate({"advantage": {"sql": "grpo"}, "horizon": 5})
    refused(lambda: plan(config), "curate.horizon", "no effect")
    own_progress = {"select": {"sql": "d3s", "progress": 0.5, "n_init": 2.0, "n_final": 2.0}, "horizon": 5}
    refused(lambda: plan(CurateConfig.model_validate(own_progress)), "curate.horizon")


def test_unknown_files_suggest_near_names() -> None:
    refused(lambda: plan(CurateConfig.model_validate({"advantage": {"sql": "grp"}})), "grp", "grpo")
    refused(lambda: plan(CurateConfig.model_validate({"advantage": {"sql": "none/of.sql"}})), "none/of.sql")


def test_bad_rows() -> None:
    config = CurateConfig.model_validate({"advantage": {"sql": "grpo"}})
    refused(lambda: curate(SCORED.drop_columns(["rollout_id"]), config), "rollout_id")
    refused(lambda: curate(SCORED.drop_columns(["group_id"]), config), "grpo.sql", "group_id")
    refused(lambda: curate(pa.concat_tables([SCORED, SCORED]), config), "r00-0", "2 times")
    nan = SCORED.set_column(3, "reward", pa.array([1.0, float("nan"), 0, 0, 0, 0]))
    refused(lambda: curate(nan, config), "r00-1", "not a finite number")
    lone = SCORED.set_column(1, "group_id", pa.array(["g", None, "g", "g", "g", "g"]))
    refused(lambda: curate(lone, config), "r00-1", "no group_id")
    text = SCORED.set_column(3, "reward", pa.array(["a"] * 6))
    refused(lambda: curate(text, config), "wrong type")


def test_only_the_named_columns_are_needed() -> None:
    rewards = SCORED.select(["rollout_id", "reward"])
    assert curate(rewards, CurateConfig.model_validate({"advantage": {"sql": "reinforce"}})).num_rows == 6
    verdicts = SCORED.select(["rollout_id", "correct"])
    assert curate(verdicts, CurateConfig.model_validate({"advantage": {"sql": "psr_nsr"}})).num_rows == 6
    assert curate(SCORED.select(["rollout_id"]), CurateConfig()).num_rows == 6


@pytest.mark.parametrize("sql", ["grpo", "ngrpo", "rloo", "reinforce"])
def test_no_rows(sql: str) -> None:
    config = CurateConfig.model_validate({"advantage": {"sql": sql}})
    empty = curate(SCORED.slice(0, 0), config)
    assert empty.num_rows == 0
    assert empty.schema.equals(curate(SCORED, config).schema)
    untyped = pa.table({name: pa.nulls(0) for name in SCORED.column_names})
    assert curate(untyped, config).num_rows == 0


def test_no_rows_through_every_kind_of_step() -> None:
    config = CurateConfig.model_validate(
        {
            "filter": {"sql": "informative_groups"},
            "advantage": {"sql": "grpo"},
            "select": {"sql": "d3s", "progress": 0.0, "n_init": 2.0, "n_final": 2.0},
        }
    )
    assert curate(SCORED.slice(0, 0), config).num_rows == 0
    assert curate(scored_table([[1, 1], [0, 0]]), config).num_rows == 0
    for parts in (
        {"pair": {"sql": "all_pairs"}},
        {"weight": {"sql": "power", "k": 1.0}, "select": {"sql": "resample"}},
    ):
        assert (
            curate(SCORED.slice(0, 0), CurateConfig.model_validate(parts), given={"seed": 0, "round": 0}).num_rows == 0
        )


def test_preference_methods_need_no_advantage() -> None:
    batch = curate(SCORED, CurateConfig.model_validate({"pair": {"sql": "right_wrong"}}))
    assert column(batch, "advantage") == [None] * 4
    assert column(batch, "weight") == [None] * 4


def test_count_groups_stops_at_the_filter() -> None:
    groups = scored_table([[1, 0], [1, 1], [0, 1]], age=[0, 0, 0, 0, 1, 1])
    config = CurateConfig.model_validate({"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}})
    assert count_groups(groups, config) == 1
    assert count_groups(groups.drop_columns(["age"]), config) == 2
    assert count_groups(groups, CurateConfig()) == 2


def test_every_packaged_file_cites_a_source_and_is_short() -> None:
    from rollway.config.assets import folder

    for step in CURATE_STEPS:
        for path in sorted((folder("sql") / STEP_FOLDERS[step]).glob("*.sql")):
            file = parse(path, step, path.read_text())
            assert len(file.description) > 30, path
            assert not file.star, path
            assert max(map(len, path.read_text().splitlines())) <= 120, path
            assert all(len(param.meaning) > 5 for param in file.params.values())
    part = CurateConfig.model_validate({"advantage": {"sql": "grpo"}}).advantage
    assert part is not None
    assert "2402.03300" in read_step("advantage", part).description
