import os
import secrets
import socket

import pytest

from rollway.scorers import Row
from sandbox import hostile


class World:
    """What programs are after: a key in the environment, files, servers; and the text that their tests expect."""

    def __init__(self, folder):
        self.marker = f"marker-{secrets.token_hex(8)}"
        self.secret = f"secret-{secrets.token_hex(8)}"
        self.secret_file, self.victim = folder / "secret", folder / "victim"
        self.secret_file.write_text(self.secret)
        self.victim.write_text("unchanged")
        for path in (self.secret_file, self.victim):
            path.chmod(0o666)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = f"rollway-{secrets.token_hex(8)}"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0{self.abstract}")
        self.unix.listen()

    def written_for(self, case):
        """The program with the paths, ports and processes of this world. Its `marker-` stays a pattern."""
        text = case.program
        for name, value in {
            "SECRET_TEXT": self.secret,
            "SECRET_FILE": str(self.secret_file),
            "VICTIM_FILE": str(self.victim),
            "PORT": str(self.tcp.getsockname()[1]),
            "ABSTRACT": self.abstract,
            "JUDGE": str(os.getpid()),
        }.items():
            text = text.replace(name, value)
        return text

    def meta(self, case):
        if case.by == "stdio":
            return {"tests": [{"input": "", "output": hostile.PRINTED}]}
        test = case.test.replace("MARKER", self.marker)
        if case.by == "asserts":
            return {"test_list": test.splitlines()}
        return {"prompt": "def answer(n):\n    pass\n", "test": test, "entry_point": "answer"}

    def untouched(self):
        return self.secret_file.read_text() == self.secret and self.victim.read_text() == "unchanged"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for above in [folder, *folder.parents][:3]:
        above.chmod(0o755)
    return World(folder)


@pytest.fixture
def make_row():
    """A row of one completion and the tests in its meta."""

    def make(completion, meta, number=0):
        messages = [{"role": "user", "content": "Write a program."}]
        return Row(f"r{number}", "p", "g", number, completion, 1, "stop", [], "t", messages, None, meta)

    return make
