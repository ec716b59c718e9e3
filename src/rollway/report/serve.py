"""`rollway serve`: the report of a folder while it grows, for this machine alone. Reads only."""

import hashlib
import json
import os
import sys
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from stat import S_ISDIR
from urllib.parse import urlsplit

from rollway.errors import RollwayError, unread
from rollway.report import build, usage

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
PAUSES = (0.1, 0.4)
"""Seconds before a page that could not be made is tried again."""


class Live:
    """The page of a folder, made anew when it is asked for and something has changed."""

    def __init__(self, results: Path, title: str) -> None:
        self._results, self._title = results, title
        self._lock = threading.Lock()
        self._version, self._page = "", b""

    def version(self) -> str:
        """Changes with every file that appears: stages write whole files by rename, which touches their folder."""
        return fingerprint(self._results)

    def page(self) -> bytes:
        """One request builds, the others wait for it. Raises RollwayError where a file is damaged."""
        with self._lock:
            version = self.version()
            if version != self._version:
                self._page, self._version = self._rendered(), version
            return self._page

    def _rendered(self) -> bytes:
        """Tried again where a file cannot be read: a stage that is run again deletes its old files first."""
        for pause in (*PAUSES, None):
            try:
                logs = usage.logs_of(self._results)
                return build.render(self._results, title=self._title, logs=logs, live=True).encode()
            except (RollwayError, OSError) as error:
                if pause is None and isinstance(error, OSError):
                    raise unread(Path(error.filename or self._results), error) from error
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def fingerprint(results: Path) -> str:
    """Of the folders of runs, rounds, passes and scores, and of tasks: each with the time of its last change.

    Not the latest of these times: where the clock was set back, what is new is older than what was there.
    """
    patterns = ("*", "*/r[0-9]*", "*/r[0-9]*/p[0-9]*", "*/r[0-9]*/p[0-9]*/scores")
    folders = [results, *(path for pattern in patterns for path in results.glob(pattern))]
    # The folder itself changes with temporary files of the report; what it holds does not count.
    found = [(str(path), _changed(path)) for path in folders[1:] if not path.name.startswith(".")]
    times = sorted(pair for pair in found if pair[1] is not None)
    return hashlib.sha256(repr(times).encode()).hexdigest()[:16]


def _changed(folder: Path) -> int | None:
    """Nanoseconds; None where it is no folder, or gone since it was listed."""
    try:
        stat = folder.stat()
    except OSError:
        return None
    return stat.st_mtime_ns if S_ISDIR(stat.st_mode) else None


class Handler(BaseHTTPRequestHandler):
    """GET / and GET /version, nothing else; only under this machine's own names, so that no web page can ask for it."""

    def __init__(self, *args: object, live: Live) -> None:
        self._live = live
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in NAMES:
            self._answer(HTTPStatus.FORBIDDEN, b"ask for 127.0.0.1\n", "text/plain")
            return
        try:
            match urlsplit(self.path).path:
                case "/":
                    self._answer(HTTPStatus.OK, self._live.page(), "text/html")
                case "/version":
                    version = json.dumps({"version": self._live.version()}).encode()
                    self._answer(HTTPStatus.OK, version, "application/json")
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, b"there is only /\n", "text/plain")
        except RollwayError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"rollway: error: {error}\n".encode(), "text/plain")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: a page asks every few seconds."""


def server(results: Path, port: int, title: str = "rollway") -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 takes a free one. Raises RollwayError where the port is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, live=Live(results, title)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise RollwayError(f"serve: port {port}: {reason}; name another with --port, or 0 for any") from error


def serve(results: Path, port: int, title: str, *, show: bool) -> None:
    """Serves until interrupted; `show` opens the browser."""
    with server(results, port, title) as made:
        address = f"http://{HOST}:{made.server_address[1]}/"
        print(f"{address} shows {results} while it grows; Ctrl-C ends it", file=sys.stderr)
        if show:
            open_page(address)
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)


def open_page(address: str) -> None:
    """In the user's browser; where there is none the address is printed."""
    import webbrowser

    graphical = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if not (graphical and webbrowser.open(address)):
        print(f"open {address}", file=sys.stderr)
