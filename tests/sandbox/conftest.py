import pytest

from rollway.scorers import Row


@pytest.fixture
def make_row():
    """A row of one completion and the tests in its meta."""

    def make(completion, meta, number=0):
        messages = [{"role": "user", "content": "Write a program."}]
        return Row(f"r{number}", "p", "g", number, completion, 1, "stop", [], "t", messages, None, meta)

    return make
