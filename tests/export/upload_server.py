"""A stand-in for the hub that takes uploads: repositories as folders, files sent in commits, without LFS or Xet."""

import base64
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.serving import serving


class UploadServer(ThreadingHTTPServer):
    """The server.

    Args:
        folder: Where repositories are kept.
        failures: Number of commits that it fails to take at first.
    """

    daemon_threads = False

    def __init__(self, folder: Path, failures: int = 0) -> None:
        self.folder, self.failures = folder, failures
        self.created: list[dict[str, Any]] = []
        self.commits = 0
        super().__init__(("127.0.0.1", 0), UploadHandler)

    @property
    def endpoint(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.server_port}"


class UploadHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: UploadServer
    timeout = 30

    def do_GET(self) -> None:
        """What is known of a repository: that it exists."""
        self._send({"id": "a/b", "sha": "0" * 40, "siblings": [], "private": True, "tags": []})

    def do_HEAD(self) -> None:
        """The same without the content."""
        self.do_GET()

    def do_POST(self) -> None:
        """Creates a repository, says how files are to be sent, or takes them."""
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self._send({"url": f"{self.server.endpoint}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._send(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif "/commit/" in path:
            self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        else:
            self.send_error(404)

    def log_message(self, *args: Any) -> None:
        """Keeps quiet."""

    def _commit(self, name: str, body: bytes) -> None:
        if self.server.failures > 0:
            self.server.failures -= 1
            self._send({"error": "the disk of the hub is full"}, 507)
            return
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = self.server.folder / name / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        self.server.commits += 1
        self._send({"commitOid": "0" * 40, "commitUrl": f"{self.server.endpoint}/{name}/commit/{'0' * 40}"})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _send(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve_uploads(folder: Path, failures: int = 0) -> AbstractContextManager[UploadServer]:
    """Runs the server within a context."""
    return serving(UploadServer(folder, failures))
