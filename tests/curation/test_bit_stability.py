"""The same bytes from any row order and any number of threads, and from the public API and the files alike."""

import numpy as np
import pyarrow as pa
import pytest

from rollway.config.curation import CurateConfig
from rollway.curation import curate

GIVEN = {"seed": 5, "round": 9, "progress": 0.3}
METHODS = [
    {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo"}},
    {"advantage": {"sql": "reinforce", "baseline": "batch"}},
    {"advantage": {"sql": "ngrpo"}},
    {"weight": {"sql": "power", "k": 1.5}, "select": {"sql": "resample"}},
    {"advantage": {"sql": "grpo"}, "select": {"sql": "d3s", "n_init": 2.0, "n_final": 6.0}},
    {"advantage": {"sql": "rloo"}, "select": {"sql": "replay"}},
    {"pair": {"sql": "all_pairs"}},
]


def scored(rows: int) -> pa.Table:
    rng = np.random.default_rng(1)
    return pa.table(
        {
            "rollout_id": [f"r{i:07d}" for i in range(rows)],
            "group_id": [f"g{i // 8:06d}" for i in range(rows)],
            "sample": np.arange(rows) % 8,
            "reward": rng.normal(size=rows) * 10.0 ** rng.integers(-6, 6, size=rows),
            "correct": rng.integers(0, 2, size=rows).astype(bool),
            "age": np.arange(rows) // 8 % 3,
        }
    )


def same_bytes(a: pa.Table, b: pa.Table) -> bool:
    def raw(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        return sink.getvalue().to_pybytes()

    return raw(a) == raw(b)


@pytest.mark.parametrize("parts", METHODS, ids=lambda parts: "-".join(part["sql"] for part in parts.values()))
def test_bytes_depend_neither_on_order_nor_on_threads(parts: dict) -> None:
    table = scored(20_000)
    config = CurateConfig.model_validate(parts)
    first = curate(table, config, given=GIVEN)
    for seed, threads in ((1, 1), (2, 2), (3, 4)):
        shuffled = table.take(np.random.default_rng(seed).permutation(table.num_rows))
        assert same_bytes(first, curate(shuffled, config, threads=threads, given=GIVEN))


def test_unordered_sums_of_users_are_stable_too(tmp_path) -> None:
    path = tmp_path / "unordered.sql"
    path.write_text("SELECT rollout_id, reward - (SELECT sum(reward) FROM scored) AS advantage FROM scored")
    config = CurateConfig.model_validate({"advantage": {"sql": str(path)}})
    table = scored(200_000)
    first = curate(table, config)
    for threads in (2, 4):
        shuffled = table.take(np.random.default_rng(threads).permutation(table.num_rows))
        assert same_bytes(first, curate(shuffled, config, threads=threads))


def test_a_memory_limit_changes_nothing() -> None:
    table = scored(100_000)
    config = CurateConfig.model_validate({"advantage": {"sql": "grpo"}})
    assert same_bytes(curate(table, config), curate(table, config, memory_limit="60MB", threads=2))
