"""`rollway serve`: reads only, on this machine alone, and is up to date."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from report.page import unpack
from rollway.errors import RollwayError
from rollway.report import serve
from store import synthetic


@contextmanager
def served(results):
    made = serve.server(results, 0, "my project")
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made.server_address[1]
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def ask(port, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def summary(body):
    start = body.index('id="data-summary">') + len('id="data-summary">')
    return unpack(body[start : body.index("<", start)])


def test_the_page_follows_the_folder_and_writes_nothing(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    before = sorted(path for path in tmp_path.rglob("*"))
    with served(tmp_path) as port:
        status, first = ask(port, "/")
        assert status == 200
        assert "connect-src 'self'" in first
        assert summary(first)["title"] == "my project"
        assert summary(first)["limits"]["rollouts"] == 12
        version = json.loads(ask(port, "/version")[1])
        assert json.loads(ask(port, "/version")[1]) == version
        assert sorted(path for path in tmp_path.rglob("*")) == before
        synthetic.write_round(tmp_path, "grpo-s0", 1)
        assert json.loads(ask(port, "/version")[1]) != version
        assert summary(ask(port, "/")[1])["limits"]["rollouts"] == 24


def test_it_answers_this_machine_alone_and_only_reads(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    with served(tmp_path) as port:
        assert ask(port, "/", host="evil.example")[0] == 403
        assert ask(port, "/", host=f"localhost:{port}")[0] == 200
        for path in ("/../report.html", "/run.json", "/grpo-s0/run.json", "//etc/passwd"):
            assert ask(port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            assert ask(port, "/", method)[0] == 501
        other = next((a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1")
        if other != "127.0.0.1":
            with pytest.raises(OSError):
                socket.create_connection((other, port), timeout=2)


def test_a_damaged_file_and_a_port_in_use_are_named(tmp_path):
    synthetic.make_results(tmp_path, {"grpo-s0": 1})
    (tmp_path / "grpo-s0/r0000/batch.parquet").write_bytes(b"nothing")
    with served(tmp_path) as port:
        status, body = ask(port, "/")
        assert status == 500
        assert "batch.parquet" in body
        with pytest.raises(RollwayError, match=f"port {port}"):
            serve.server(tmp_path, port)
