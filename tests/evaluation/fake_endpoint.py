"""A stand-in for an OpenAI-compatible endpoint: a judge that likes the longer answer, and fails as it is told to."""

import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serving import serving


class FakeEndpoint(ThreadingHTTPServer):
    """The server.

    Args:
        script: What to do with the first requests: a status, or a text to say. Afterwards it gives verdicts.
    """

    daemon_threads = False

    def __init__(self, script: list[int | str]) -> None:
        self.script, self.asked = script, 0
        self.keys: set[str | None] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """The address of the API."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: FakeEndpoint
    timeout = 30

    def do_POST(self) -> None:
        """A chat completion."""
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        self.server.keys.add(self.headers.get("Authorization"))
        step = self.server.script.pop(0) if self.server.script else None
        if isinstance(step, int):
            self.send_response(step)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        found = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nWrite", body["messages"][0]["content"], re.S)
        assert found is not None
        verdict = "A" if len(found[1]) > len(found[2]) else "B" if len(found[1]) < len(found[2]) else "C"
        said = step if isinstance(step, str) else f"[[{verdict}]]"
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Keeps quiet."""


def fake_endpoint(*script: int | str) -> AbstractContextManager[FakeEndpoint]:
    """Runs the server within a context."""
    return serving(FakeEndpoint(list(script)))
