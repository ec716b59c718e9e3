"""A judge that answers what a test says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """A judge on a local port: `say` maps the prompt and the number of the attempt to (status, content, headers)."""

    def __init__(self, say):
        self.requests, self.headers, self.times = [], [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                attempt = sum(r["messages"][0]["content"] == prompt for r in stub.requests)
                stub.requests.append(body)
                stub.headers.append(dict(self.headers))
                stub.times.append(time.monotonic())
                status, content, headers = say(prompt, attempt)
                reply = {"choices": [{"message": {"content": content}}]} if status == 200 else {"error": content}
                raw = content if isinstance(content, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
