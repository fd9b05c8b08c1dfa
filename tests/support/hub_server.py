"""A Hugging Face Hub on the loopback: folders as repositories, over real HTTP, bytes counted.

Answers what huggingface_hub asks when a repository is listed and its files are read: the model's
description with files and sizes, and files by HEAD and GET with ranges, by way of a redirect to
another address as the real one does for weights. `Hub.misbehave` makes it do otherwise.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

Misbehave = Callable[["Handler", str], bool]
"""Given the path of a request; true where it has answered."""


class Hub:
    """``repos`` maps ``ORG/NAME`` to a folder; every name of a revision means its one commit.

    ``bytes_sent`` counts bodies, ``requests`` the paths by kind: "api", "file", and "cdn" for what a
    redirect led to; ``tokens`` are what was sent to log in, by the same kinds.
    """

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.revisions = {"main", "v1", "refs/pr/1", "feature/x"}
        self.bytes_sent = 0
        self.requests: Counter[str] = Counter()
        self.tokens: dict[str, set[str | None]] = {"api": set(), "file": set(), "cdn": set()}
        self.ranges = True
        self.misbehave: Misbehave = lambda handler, path: False
        # Given an open file and a range of it; true where it has sent that, or what it wants to.
        self.send: Callable[[Handler, BinaryIO, int, int], bool] | None = None
        self.lock = threading.Lock()
        self.endpoint = ""

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


def listed(file: Path) -> dict[str, object]:
    """Size and digests of a file: weights are in LFS, and git has a short file in their place."""
    n_bytes = file.stat().st_size
    entry: dict[str, object] = {"size": n_bytes}
    if file.suffix == ".safetensors":
        with file.open("rb") as content:
            # Sparse files of any size are listed too, and nobody compares them.
            sha256 = (
                hashlib.file_digest(content, "sha256").hexdigest() if n_bytes < 10**8 else "0" * 64
            )
        entry["lfs"] = {"sha256": sha256, "size": n_bytes, "pointerSize": 134}
        blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n".encode()
    else:
        blob = file.read_bytes()
    return entry | {"blobId": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A body would wait for the acknowledgement of its headers.
    disable_nagle_algorithm = True
    hub: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        hub = self.hub
        with hub.lock:
            kind = path.split("/")[1] if path.startswith(("/api/", "/cdn/")) else "file"
            hub.requests[kind] += 1
            hub.tokens[kind].add(self.headers.get("authorization"))
        if hub.misbehave(self, path):
            return
        if path.startswith("/api/models/"):
            self.describe(path.removeprefix("/api/models/"), parse_qs(url.query))
        elif path.startswith("/cdn/"):
            self.send_file(*path.removeprefix("/cdn/").split("/", 2))
        elif "/resolve/" in path:
            repo, rest = path[1:].split("/resolve/")
            self.resolve(repo, *rest.split("/", 1))
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def describe(self, path: str, query: dict[str, list[str]]) -> None:
        repo, _, revision = path.replace("/tree/", "/revision/").partition("/revision/")
        if repo not in self.hub.repos:
            return self.answer(401, code="RepoNotFound", message="Repository not found")
        commit = self.hub.commit(repo)
        if revision and revision not in {*self.hub.revisions, commit}:
            return self.answer(404, code="RevisionNotFound", message="Invalid rev id")
        folder = self.hub.repos[repo]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if "/tree/" in path:
            entries = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
            return self.answer_json(
                [{"type": "file", "path": p, "size": n, "oid": "0" * 40} for p, n in entries]
            )
        siblings = [
            {"rfilename": file.relative_to(folder).as_posix()}
            | (listed(file) if "blobs" in query else {})
            for file in files
        ]
        self.answer_json({"id": repo, "sha": commit, "siblings": siblings, "private": False})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self.hub.commit(repo)
        if repo not in self.hub.repos:
            return self.answer(401, code="RepoNotFound")
        # Whoever lists one commit and reads another may mix two of them.
        assert revision == commit, f"{revision} was asked for, not the commit"
        if not (self.hub.repos[repo] / file).is_file():
            return self.answer(404, code="EntryNotFound")
        if file.endswith(".safetensors"):
            # Another name of this machine is another host to who follows.
            elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
            size = str((self.hub.repos[repo] / file).stat().st_size)
            at = {"x_repo_commit": commit, "x_linked_size": size, "x_linked_etag": '"1"'}
            return self.answer(302, location=f"{elsewhere}/cdn/{repo}/{quote(file)}", **at)
        self.send_file(*repo.split("/"), file)

    def send_file(self, org: str, name: str, file: str) -> None:
        path = self.hub.repos[f"{org}/{name}"] / file
        n_bytes = path.stat().st_size
        first, last, status = 0, n_bytes, 200
        asked = self.headers.get("range", "")
        if self.hub.ranges and asked.startswith("bytes="):
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end) + 1, n_bytes), 206
        self.send_response(status)
        if status == 206:
            self.send_header("content-range", f"bytes {first}-{last - 1}/{n_bytes}")
        self.send_header("content-length", str(last - first))
        self.send_header("etag", '"1"')
        self.send_header("x-repo-commit", self.hub.commit(f"{org}/{name}"))
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as content:
            self.send_range(content, first, last)

    def send_range(self, content: BinaryIO, first: int, last: int) -> None:
        if self.hub.send is not None and self.hub.send(self, content, first, last):
            return
        content.seek(first)
        while first < last:
            first += self.send_bytes(content.read(min(65536, last - first)))

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), kind="application/json")

    def answer(
        self,
        status: int,
        body: bytes = b"",
        kind: str = "text/plain",
        code: str = "",
        message: str = "",
        location: str = "",
        **headers: str,
    ) -> None:
        self.send_response(status)
        given = {"x-error-code": code, "x-error-message": message, "location": location}
        for header, value in {**given, **headers}.items():
            if value:
                self.send_header(header.replace("_", "-"), value)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_bytes(body)

    def send_bytes(self, block: bytes) -> int:
        try:
            self.wfile.write(block)
        except OSError:
            # Who asked has had enough; nothing more of this file is to be counted.
            self.close_connection = True
            return 1 << 62
        with self.hub.lock:
            self.hub.bytes_sent += len(block)
        return len(block)

    def log_message(self, *said: object) -> None:
        pass


def asking(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that asks the hub at ``endpoint`` and no other."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_about: object) -> None:
        """Whoever asked was killed, or has hung up."""


@contextmanager
def serve(**repos: Path) -> Iterator[Hub]:
    """A running hub whose repositories are ``org/KEYWORD``."""
    hub = Hub({f"org/{name}": folder for name, folder in repos.items()})
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with Server(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        # The server looks this often whether it shall end.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        server.shutdown()
