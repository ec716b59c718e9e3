"""A language model as judge: structured verdicts over an OpenAI-compatible HTTP interface, cached on disk."""

import hashlib
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rollway.config.scorers import JudgeScorer
from rollway.errors import RollwayError
from rollway.runtime.notice import tick
from rollway.scorers.rows import Row, Verdict
from rollway.store.atomic import write_json
from rollway.template import render

BACKOFF = 0.5
"""Seconds before the first retry; doubled for each further one."""
LONGEST_WAIT = 60.0
"""Seconds: what a server's Retry-After is cut to."""
LONGEST_REPLY = 4 * 2**20
"""Bytes of a reply that are read; a longer one is unusable."""

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_HOPELESS = {401, 403, 404, 405}


class _Unusable(Exception):
    """This attempt failed; `wait` is the pause that the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0, again: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.again = again


def verdicts(
    name: str, config: JudgeScorer, rows: list[Row], needs: dict[str, dict[str, float]], cache: Path | None
) -> list[Verdict | None]:
    """Reward (score - low) / (high - low), or the score itself; component `score`. Equal requests are sent once.

    A row without a usable verdict after all retries is that row's error. Once more rows have failed than
    `max_error_share` allows, no further request is sent: None for what was not asked.
    Raises RollwayError when the key is missing or refused, or there is nothing at the URL.
    """
    client = _Client(name, config)
    bodies = [_body(config, row, needs) for row in rows]
    asking = Counter(body for body in bodies if body is not None)
    failed, found = len(rows) - asking.total(), dict[str, Verdict]()
    with ThreadPoolExecutor(config.parallel) as pool:
        jobs = {pool.submit(_verdict, client, config, body, cache): body for body in asking}
        try:
            for job in as_completed(jobs):
                verdict = found[jobs[job]] = job.result()
                tick(reward=verdict.reward)
                failed += 0 if verdict.error is None else asking[jobs[job]]
                if failed > config.max_error_share * len(rows):
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    unworded = Verdict.failed("a field of the judge's prompt is null on this row")
    return [unworded if body is None else found.get(body) for body in bodies]


def read_verdict(text: str, low: float, high: float) -> tuple[float, str]:
    """Score and reason from a judge's message: JSON, alone, fenced, or inside other words.

    Of several objects the last one counts: judges repeat the example of their instructions before they decide.
    Raises ValueError when there is no {"score": number} or the score lies outside [low, high].
    """
    decoder = json.JSONDecoder()
    verdict, end = None, 0
    for start in (match.start() for match in re.finditer(r"\{", text)):
        if start < end:
            continue
        try:
            value, after = decoder.raw_decode(text, start)
        except ValueError:
            continue
        except RecursionError:
            raise ValueError(f"JSON nested too deeply in {text[start : start + 80]!r}") from None
        if isinstance(value, dict) and "score" in value:
            verdict, end = value, after
    if verdict is None:
        raise ValueError(f"no JSON object with a score in {text[:80]!r}")
    reason = verdict.get("reason", "")
    return _number(verdict["score"], low, high), reason if isinstance(reason, str) else ""


def _number(value: Any, low: float, high: float) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        shown = repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ValueError(f"score {shown} is not a number") from None
    if not math.isfinite(score) or not low <= score <= high:
        raise ValueError(f"score {score:g} is outside {low:g} to {high:g}")
    return score


def _body(config: JudgeScorer, row: Row, needs: dict[str, dict[str, float]]) -> str | None:
    """The request as canonical JSON, which is also what the cache is keyed by."""
    fields = row.as_dict({need: rewards[row.rollout_id] for need, rewards in needs.items()})
    prompt = render(config.prompt, fields, f"judge prompt, rollout {row.rollout_id}")
    if prompt is None:
        return None
    verdict = {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
        "required": ["reason", "score"],
        "additionalProperties": False,
    }
    schema = {"name": "verdict", "strict": True, "schema": verdict}
    request = {
        "model": config.model,
        "temperature": 0,
        "messages": [{"role": "user", "content": prompt}],
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    return json.dumps(request, sort_keys=True)


def _verdict(client: "_Client", config: JudgeScorer, body: str, cache: Path | None) -> Verdict:
    digest = hashlib.sha256(f"{config.url}\n{body}".encode()).hexdigest()
    path = cache / digest[:2] / f"{digest}.json" if cache else None
    try:
        score, reason = read_verdict(path.read_text(encoding="utf-8"), config.low, config.high) if path else (None, "")
    except (FileNotFoundError, ValueError):
        score = None
    if score is None:
        try:
            score, reason = client.ask(body)
        except _Unusable as error:
            return Verdict.failed(str(error))
        if path:
            write_json(path, {"score": score, "reason": reason})
    reward = (score - config.low) / (config.high - config.low) if config.normalise else score
    return Verdict(reward, {"score": score})


def _ways_to_write(key: str) -> re.Pattern[str]:
    """A text as it is, quoted, or with any of its characters as escapes of JSON or Python, be they quoted again."""
    written = []
    for character in key:
        units = character.encode("utf-16-be").hex(" ", 2).split()
        codes = ["".join(rf"\\+u{unit}" for unit in units)]
        codes += [rf"\\+x{ord(character):02x}"] if ord(character) < 256 else []
        quoted = r"\\*" if character in "/\"'\\" else ""
        written.append(rf"(?:{quoted}{re.escape(character)}|(?i:{'|'.join(codes)}))")
    return re.compile("".join(written))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Client:
    """Sends requests at the configured rate; the key stays in the header and out of every message."""

    def __init__(self, name: str, config: JudgeScorer) -> None:
        self._name = name
        self._config = config
        self._headers = {"Content-Type": "application/json"}
        self._written: re.Pattern[str] | None = None
        if config.key_env is not None:
            key = os.environ.get(config.key_env, "")
            if not key:
                raise RollwayError(f"scorer {name}: environment variable {config.key_env} is empty; put the key there")
            self._written = _ways_to_write(key)
            self._headers["Authorization"] = f"Bearer {key}"
        base = config.url.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._wait_turn = _pacer(1.0 / config.requests_per_second)

    def ask(self, body: str) -> tuple[float, str]:
        """Raises _Unusable when the last attempt failed, RollwayError when no request can succeed.

        Whatever a server says goes through here: neither a message nor a reason holds the key.
        """
        attempt = 0
        while True:
            self._wait_turn()
            try:
                score, reason = read_verdict(self._send(body), self._config.low, self._config.high)
                return score, self._without_key(reason)
            except ValueError as error:
                failure = _Unusable(str(error))
            except _Unusable as error:
                failure = error
            except RollwayError as error:
                raise RollwayError(self._without_key(str(error))) from None
            if not failure.again or attempt >= self._config.retries:
                raise _Unusable(self._without_key(f"{failure} ({attempt + 1} attempts)"))
            time.sleep(min(LONGEST_WAIT, max(failure.wait, BACKOFF * 2**attempt)))
            attempt += 1

    def _send(self, body: str) -> str:
        request = urllib.request.Request(self._url, body.encode(), self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._config.timeout) as response:
                raw = response.read(LONGEST_REPLY + 1)
            if len(raw) > LONGEST_REPLY:
                raise _Unusable(f"the reply is longer than {LONGEST_REPLY // 2**20} MiB")
            reply = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise self._http_failure(error) from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = str(reason).strip() or type(error).__name__
            raise _Unusable(f"no reply from {self._config.url} ({said})") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Unusable("the reply is not a chat completion") from None
        if not isinstance(content, str):
            raise _Unusable("the reply holds no text (a refusal, or a tool call)")
        return self._without_key(content)

    def _without_key(self, text: str) -> str:
        """What a server sends back is recorded and cached, should it repeat the key, however written."""
        return text if self._written is None else self._written.sub("***", text)

    def _http_failure(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in _HOPELESS or 300 <= error.code < 400:
            mend = f"check the key in {self._config.key_env}" if error.code in (401, 403) else "check the url"
            return RollwayError(
                f"scorer {self._name}: {self._config.url} answers HTTP {error.code} {error.reason}; {mend}"
            )
        detail = self._without_key(error.read(1 << 16).decode("utf-8", "replace"))  # before it is cut: no part of a key
        asked = error.headers.get("Retry-After", "")
        wait = float(asked) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked) else 0.0
        return _Unusable(f"HTTP {error.code}: {detail[:200]}", wait, again=error.code in _RETRIED)


def _pacer(interval: float) -> Callable[[], None]:
    """A function that returns at most once per `interval` seconds, over all threads."""
    lock = threading.Lock()
    due = time.monotonic()

    def wait() -> None:
        nonlocal due
        with lock:
            turn = max(due, time.monotonic())
            due = turn + interval
        time.sleep(max(0.0, turn - time.monotonic()))

    return wait
