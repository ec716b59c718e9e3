import pytest

from rollway.scorers import Row, score


@pytest.fixture
def make_row():
    """A row of one completion; further fields by name."""

    def make(completion, answer="4", number=0, **fields):
        given = {
            "rollout_id": f"r{number}",
            "prompt_id": "p",
            "group_id": "g",
            "sample": number,
            "completion": completion,
            "length": len(completion),
            "finish": "stop",
            "tokens": list(completion.encode()),
            "task": "t",
            "messages": [{"role": "user", "content": "2+2="}],
            "answer": answer,
            "meta": {"format": "plain", "demonstration": "4"},
        }
        return Row(**{**given, **fields})

    return make


@pytest.fixture
def run(tmp_path):
    """Scores rows and returns the table's rows."""

    def run_scorer(config, rows, needs=None, threads=2, cache=None):
        table = score("s", config, rows, needs=needs or {}, threads=threads, root=tmp_path, cache=cache)
        assert table.column("rollout_id").to_pylist() == [row.rollout_id for row in rows]
        return table.to_pylist()

    return run_scorer
