"""The first word of the vLLM process, however it arrives."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollway.engines.vllm_client import Conversation, EngineDied
from rollway.engines.vllm_launch import Server
from rollway.engines.vllm_process import frames
from rollway.errors import RollwayError


class Process(Server):
    """The client's end of a pair of sockets; no process."""

    ended = False

    def __init__(self, connection: socket.socket, log: Path, lives: bool = True) -> None:
        super().__init__(connection, log, None, 0)
        self.lives = lives

    def alive(self) -> bool:
        return self.lives

    def end(self) -> None:
        self.ended = True
        self.connection.close()


@pytest.fixture
def engine() -> Iterator[Callable[..., socket.socket]]:
    """Sends parts, with pauses before them, on the other end of what it returns."""
    opened: list[socket.socket] = []

    def start(*parts: tuple[float, bytes]) -> socket.socket:
        ours, theirs = socket.socketpair()
        opened.extend((ours, theirs))

        def speak() -> None:
            for pause, data in parts:
                time.sleep(pause)
                theirs.sendall(data)

        threading.Thread(target=speak, daemon=True).start()
        return ours

    yield start
    for end in opened:
        end.close()


def greeting() -> bytes:
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, {"version": frames.VERSION, "held": "x" * 300})
        return there.recv(4096)


def test_a_greeting_that_comes_in_pieces_is_whole(engine: Callable, tmp_path: Path) -> None:
    """Cut in its head and in its text, with more time between than one look for it takes."""
    whole = greeting()
    connection = engine((0.0, whole[:5]), (1.3, whole[5:40]), (1.3, whole[40:]))
    talk = Conversation(Process(connection, tmp_path / "log"))
    assert talk.greet(60)["held"] == "x" * 300
    assert connection.gettimeout() is None


@pytest.mark.parametrize("said", [b"", greeting()[:5]])
def test_an_engine_that_says_too_little_is_ended_in_time(said: bytes, engine: Callable, tmp_path: Path) -> None:
    server = Process(engine((0.0, said)), tmp_path / "log")
    begin = time.monotonic()
    with pytest.raises(RollwayError, match=r"was not ready after 1 s; raise rollout\.engine\.start_seconds"):
        Conversation(server).greet(1)
    assert server.ended
    assert time.monotonic() - begin < 10


def test_an_engine_that_dies_before_its_greeting_is_noticed(engine: Callable, tmp_path: Path) -> None:
    with pytest.raises(EngineDied, match="did not start"):
        Conversation(Process(engine(), tmp_path / "log", lives=False)).greet(60)
