import json
import re
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollway.config.scorers import JudgeScorer
from rollway.errors import RollwayError
from rollway.scorers import judge
from rollway.scorers.judge import read_verdict
from scorers.stub_judge import Stub

KEY = "sk-very-secret"
ESCAPED = "".join(f"\\u{ord(c):04X}" for c in KEY)
TWICE = json.dumps(json.dumps({"error": ESCAPED}))
HALF = KEY[:7] + "".join(f"\\u{ord(c):04x}" for c in KEY[7:10]) + "".join(f"\\x{ord(c):02x}" for c in KEY[10:])


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(judge, "BACKOFF", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = []

    def start(say):
        running.append(Stub(say))
        return running[-1]

    yield start
    for each in running:
        each.close()


def config(stub, **settings):
    given = {"url": stub.url, "model": "m", "prompt": "Rate {completion}", "requests_per_second": 1000.0}
    return JudgeScorer(**{**given, "key_env": "JUDGE_KEY", **settings})


def verdict(score):
    return json.dumps({"reason": "because", "score": score})


def test_verdicts_are_scaled_structured_and_sent_once_per_prompt(stub, make_row, run):
    server = stub(lambda prompt, attempt: (200, verdict({"a": 1, "b": 10, "c": 5.5}[prompt[-1]]), {}))
    rows = [make_row(text, number=n) for n, text in enumerate("abcab")]
    found = run(config(server), rows)
    assert [row["reward"] for row in found] == [0.0, 1.0, 0.5, 0.0, 1.0]
    assert dict(found[2]["components"]) == {"score": 5.5}
    assert len(server.requests) == 3
    assert server.requests[0]["response_format"]["type"] == "json_schema"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_the_cache_answers_for_the_server_and_holds_no_key(stub, make_row, run, tmp_path):
    server = stub(lambda prompt, attempt: (200, verdict(4), {}))
    cache = tmp_path / "cache"
    rows = [make_row("a", number=0), make_row("b", number=1)]
    first = run(config(server), rows, cache=cache)
    assert run(config(server), rows, cache=cache) == first
    assert len(server.requests) == 2
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert all(KEY not in path.read_text() for path in files)
    files[0].write_text("{broken")
    assert run(config(server), rows, cache=cache) == first
    assert len(server.requests) == 3
    run(config(server, model="other"), rows, cache=cache)
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(stub, make_row, run, status):
    server = stub(
        lambda p, attempt: (200, verdict(10), {}) if attempt == 2 else (status, "busy", {"Retry-After": "0.1"})
    )
    assert run(config(server), [make_row("a")])[0]["reward"] == 1.0
    assert server.times[1] - server.times[0] >= 0.1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("I think it is good", "no JSON object with a score"),
        (verdict(11), "score 11 is outside 1 to 10"),
        (verdict(float("nan")), "outside"),
        (verdict("ten"), "not a number"),
        (verdict(None), "not a number"),
        (verdict(True), "outside"),
        (None, "holds no text"),
        (b"not json", "not a chat completion"),
        (b"[]", "not a chat completion"),
        (b"[" * 100_000 + b"]" * 100_000, "not a chat completion"),
        (b'{"choices": ' + b'{"a":' * 100_000, "not a chat completion"),
        ('{"score": ' * 100_000, "nested too deeply"),
        ('{"score": ' + "[" * 100_000, "nested too deeply"),
        (verdict([[7]]), "score of type list is not a number"),
        (b" " * (judge.LONGEST_REPLY + 1), "longer than 4 MiB"),
    ],
)
def test_useless_replies_are_errors_of_the_row_after_retries(stub, make_row, run, content, words):
    server = stub(lambda prompt, attempt: (200, content, {}))
    (found,) = run(config(server, retries=1, max_error_share=1.0), [make_row("a")])
    assert found["reward"] == 0.0
    assert words in found["error"]
    assert len(server.requests) == 2


def test_a_reason_that_is_no_text_is_left_out():
    assert read_verdict('{"score": 7, "reason": ["a", 1]}', 1, 10) == (7.0, "")


def test_refusals_of_a_request_are_not_repeated_and_never_show_the_key(stub, make_row, run):
    server = stub(lambda prompt, attempt: (400, f"bad request by {KEY}", {}))
    (found,) = run(config(server, max_error_share=1.0), [make_row("a")])
    assert "HTTP 400" in found["error"]
    assert KEY not in found["error"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "headers"), [(401, {}), (404, {}), (307, {"Location": "http://127.0.0.1:9/"})])
def test_hopeless_replies_stop_the_stage(stub, make_row, run, status, headers):
    server = stub(lambda prompt, attempt: (status, KEY, headers))
    with pytest.raises(RollwayError, match=f"HTTP {status}") as caught:
        run(config(server, max_error_share=1.0), [make_row("a")])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        f"HTTP/1.1 401 bad {KEY}\r\nContent-Length: 0\r\n\r\n",
        f"HTTP/1.1 404 {KEY}\r\nContent-Length: 0\r\n\r\n",
        f"HTTP/1.1 418 no {KEY}\r\nContent-Length: {len(KEY)}\r\n\r\n{KEY}",
        f"HTTP/1.1 418 no\r\nContent-Length: 600\r\n\r\n{'x' * 193 + KEY:600}",
        f"HTTP/1.1 418 no\r\nContent-Length: {len(ESCAPED)}\r\n\r\n{ESCAPED}",
        f"HTTP/1.1 418 no\r\nContent-Length: {len(TWICE)}\r\n\r\n{TWICE}",
        f"HTTP/1.1 500 no\r\nContent-Length: {len(HALF)}\r\n\r\n{HALF}",
        f"HTTP/1.1 404 {ESCAPED}\r\nContent-Length: 0\r\n\r\n",
        f"junk {ESCAPED}\r\n\r\n",
        f"junk {KEY}\r\n\r\n",
        f"HTTP/1.1 {KEY} OK\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n",
    ],
)
def test_the_key_is_in_no_message_whatever_a_server_says(reply, make_row, run, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            line, _ = server.accept()
            line.recv(1 << 16)
            line.sendall(reply.encode())
            line.close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        given = JudgeScorer(
            url=url, model="m", prompt="{completion}", key_env="JUDGE_KEY", retries=0, max_error_share=1
        )
        try:
            said = run(given, [make_row("a")])[0]["error"]
        except RollwayError as error:
            said = str(error)
    assert said and "\n" not in said
    assert KEY[:10] not in said
    assert KEY[:10] not in unescaped(said)


def unescaped(text):
    return re.sub(r"\\+(?:u00|U00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)


@pytest.mark.parametrize("escape", ["score", "reason"])
def test_a_key_written_with_escapes_is_not_recorded(stub, make_row, run, tmp_path, escape):
    hidden = "".join(f"\\u{ord(c):04x}" for c in KEY)
    server = stub(lambda prompt, attempt: (200, f'{{"score": 7, "reason": "", "{escape}": "{hidden}"}}', {}))
    (found,) = run(config(server, retries=0, max_error_share=1), [make_row("a")], cache=tmp_path / "cache")
    assert found["error"] is None or "score '***' is not a number" in found["error"]
    said = [found["error"] or "", *(path.read_text() for path in tmp_path.rglob("*.json"))]
    assert not any(KEY[:10] in unescaped(text) for text in said)


def test_timeouts_and_silence(stub, make_row, run):
    def slow(prompt, attempt):
        time.sleep(0.5 if attempt == 0 else 0)
        return 200, verdict(10), {}

    assert run(config(stub(slow), timeout=0.2), [make_row("a")])[0]["reward"] == 1.0
    silent = JudgeScorer(url="http://127.0.0.1:9/v1", model="m", prompt="x", retries=0, max_error_share=1.0)
    assert "no reply from" in run(silent, [make_row("a")])[0]["error"]


def test_the_rate_is_kept_over_all_threads(stub, make_row, run):
    server = stub(lambda prompt, attempt: (200, verdict(10), {}))
    rows = [make_row(text, number=n) for n, text in enumerate("abcdef")]
    run(config(server, requests_per_second=20.0, parallel=6), rows)
    assert max(server.times) - min(server.times) >= 5 / 20 - 0.05


def test_parallel_requests_overlap(stub, make_row, run):
    def slow(prompt, attempt):
        time.sleep(0.2)
        return 200, verdict(10), {}

    start = time.monotonic()
    run(config(stub(slow), parallel=6), [make_row(text, number=n) for n, text in enumerate("abcdef")])
    assert time.monotonic() - start < 0.9


def test_a_missing_key_or_field_is_named(make_row, run, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RollwayError, match="JUDGE_KEY"):
        run(JudgeScorer(url="http://x", model="m", prompt="x", key_env="JUDGE_KEY"), [make_row("a")])
    with pytest.raises(RollwayError, match="complition"):
        run(JudgeScorer(url="http://x", model="m", prompt="{complition}"), [make_row("a")])
    found = run(JudgeScorer(url="http://x", model="m", prompt="{answer}", max_error_share=1), [make_row("a", None)])
    assert "null" in found[0]["error"]


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 7, "reason": "r"}',
        '```json\n{"score": 7, "reason": "r"}\n```',
        'Here {you} go: {"reason": "r", "score": "7.0"} done',
        '{"other": 1} {"score": 7, "reason": "r"}',
    ],
)
def test_verdicts_are_found_in_other_words(text):
    assert read_verdict(text, 1, 10) == (7.0, "r")


@given(st.text() | st.text(alphabet='{}[]":score0123456789 ,'))
def test_any_text_is_a_score_in_range_or_a_value_error(text):
    try:
        score, _ = read_verdict(text, 1, 10)
    except ValueError:
        return
    assert 1 <= score <= 10


def test_the_last_verdict_counts():
    """A judge that repeats the example of its instructions, or grades in steps, decides at the end."""
    text = 'Like {"reason": "...", "score": 3}. So: {"reason": "all right", "score": 8, "parts": {"score": 2}} {"a": 1}'
    assert read_verdict(text, 1, 10) == (8.0, "all right")
    with pytest.raises(ValueError, match="outside"):
        read_verdict('{"score": 5} {"score": 50}', 1, 10)
