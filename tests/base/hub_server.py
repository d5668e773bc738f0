"""A stand-in for the Hugging Face hub: local folders served over HTTP, as far as loading code asks for them.

It knows model and data set repositories of one commit each, on the branch ``main``, without tokens, LFS or Xet.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.serving import serving

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
FILE = re.compile(rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{REPO}"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


class HubError(Exception):
    """An answer with an error; ``code`` tells what was not found or not allowed."""

    def __init__(self, code: str, commit: str | None = None, status: HTTPStatus = HTTPStatus.NOT_FOUND) -> None:
        super().__init__(code)
        self.code, self.commit, self.status = code, commit, status


@dataclass(frozen=True)
class Repository:
    """The files of a folder as one commit.

    Attributes:
        folder: Where the files are.
        sizes: Bytes of each file, by its path in the repository.
        blobs: Git's object id of each file; the hub's ETag.
        commit: 40 hexadecimal digits that change with the content.
    """

    folder: Path
    sizes: dict[str, int]
    blobs: dict[str, str]
    commit: str

    @classmethod
    def read(cls, folder: Path) -> "Repository":
        """Reads a folder."""
        if not folder.is_dir():
            raise NotADirectoryError(folder)
        sizes, blobs = {}, {}
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                path, content = file.relative_to(folder).as_posix(), file.read_bytes()
                sizes[path] = len(content)
                blobs[path] = _sha1(b"blob %d\0" % len(content) + content)
        return cls(folder, sizes, blobs, _sha1(json.dumps(blobs).encode()))

    def info(self, name: str) -> dict[str, Any]:
        """What the hub tells of a repository."""
        return {
            "id": name,
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [
                {"rfilename": path, "size": self.sizes[path], "blobId": self.blobs[path]} for path in self.blobs
            ],
        }

    def entries(self) -> list[dict[str, Any]]:
        """All files and folders."""
        folders = {str(parent) for path in self.blobs for parent in PurePosixPath(path).parents} - {"."}
        return [
            *({"type": "directory", "path": path, "size": 0, "oid": _sha1(path.encode())} for path in sorted(folders)),
            *({"type": "file", "path": path, "size": self.sizes[path], "oid": oid} for path, oid in self.blobs.items()),
        ]

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What is in ``folder`` ('' for the whole repository); with ``recursive``, what is further down too."""
        entries = self.entries()
        if folder and not any(entry["path"] == folder and entry["type"] == "directory" for entry in entries):
            raise HubError("EntryNotFound", self.commit)
        parent = PurePosixPath(folder)
        return [
            entry
            for entry in entries
            if parent == PurePosixPath(entry["path"]).parent
            or (recursive and parent in PurePosixPath(entry["path"]).parents)
        ]


class HubServer(ThreadingHTTPServer):
    """The server; its requests are done when it is closed.

    Args:
        repositories: By kind (``models`` or ``datasets``) and name.
        gated: Names of repositories whose files need a token.
    """

    daemon_threads = False

    def __init__(self, repositories: dict[tuple[str, str], Repository], gated: Collection[str]) -> None:
        self.repositories, self.gated = repositories, gated
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def endpoint(self) -> str:
        """What ``HF_ENDPOINT`` must be."""
        return f"http://127.0.0.1:{self.server_port}"

    def find(self, kind: str, name: str, revision: str) -> Repository:
        """A repository, if it has the revision."""
        repository = self.repositories.get((kind, name))
        if repository is None:
            raise HubError("RepoNotFound")
        if revision not in ("main", repository.commit):
            raise HubError("RevisionNotFound")
        return repository


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request: HTTP/1.0, so that no connection outlives its answer."""

    server: HubServer
    timeout = 30

    def do_HEAD(self) -> None:
        """Headers of a file, or of anything else."""
        self._answer()

    def do_GET(self) -> None:
        """A file, what is known of a repository, or a list of its files."""
        self._answer()

    def do_POST(self) -> None:
        """What is known of certain paths."""
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Keeps quiet."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        with suppress(ConnectionError):  # the client may have had enough
            try:
                if match := FILE.fullmatch(url.path):
                    self._send_file(**match.groupdict())
                elif match := API.fullmatch(url.path):
                    self._send_json(self._ask(**match.groupdict(), query=parse_qs(url.query)))
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)
            except HubError as error:
                body = json.dumps({"error": error.code}).encode()
                self._send(
                    error.status,
                    body,
                    {"X-Error-Code": error.code, "X-Error-Message": error.code},
                    error.commit,
                )

    def _ask(
        self,
        kind: str,
        repo: str,
        what: str | None,
        revision: str | None,
        path: str | None,
        query: dict[str, list[str]],
    ) -> Any:
        repository = self.server.find(kind, repo, unquote(revision or "main"))
        if what == "tree":
            return repository.tree(
                unquote(path or ""), recursive=query.get("recursive", ["false"])[0].lower() == "true"
            )
        if what == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            return [entry for entry in repository.entries() if entry["path"] in form.get("paths", [])]
        return repository.info(repo)

    def _send_file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        repository = self.server.find("datasets" if kind else "models", repo, unquote(revision))
        path = unquote(path)
        if repo in self.server.gated:
            raise HubError("GatedRepo", repository.commit, HTTPStatus.UNAUTHORIZED)
        if path not in repository.blobs:
            raise HubError("EntryNotFound", repository.commit)
        content = (repository.folder / path).read_bytes()
        status, headers = HTTPStatus.OK, {"ETag": f'"{repository.blobs[path]}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(0, len(content) - int(last or 0))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= stop:
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                headers["Content-Range"] = f"bytes */{len(content)}"
            else:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        self._send(status, content, {"Content-Type": "application/octet-stream", **headers}, repository.commit)

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str], commit: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub(models: dict[str, Path], datasets: dict[str, Path], gated: Collection[str] = ()) -> Iterator[str]:
    """Serves folders as the repositories of a hub, from this process.

    Args:
        models: Folder of each model repository, by its id.
        datasets: Folder of each data set repository, by its id.
        gated: Ids of repositories whose files need a token.

    Yields:
        The value for ``HF_ENDPOINT``, which must be set before ``huggingface_hub`` is imported.
    """
    kinds = {"models": models, "datasets": datasets}
    repositories = {
        (kind, name): Repository.read(folder) for kind, folders in kinds.items() for name, folder in folders.items()
    }
    with serving(HubServer(repositories, gated)) as server:
        yield server.endpoint


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
