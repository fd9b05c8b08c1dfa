"""An S3 server on the loopback: moto's, over real HTTP, in a process of its own.

`s3_server` starts one for a test, and sets what a driver needs to find it. `S3Server.fail` makes
requests fail, and `S3Server.kill` ends it as a power cut would.

    python tests/support/s3_server.py [PORT]     # by hand; prints its address
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote
from urllib.request import Request, urlopen

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nobody looks for files, or for the credentials of a machine.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_CONTROL = "/_control/"


class S3Server:
    """A server in a process of its own; its buckets end with it."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint.startswith("http://127.0.0.1:"), self.endpoint
        self.environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def create_bucket(self, name: str) -> str:
        """Creates a bucket and returns its address."""
        self._ask(name, "PUT")
        return f"s3://{name}"

    def fail(
        self,
        method: str = "",
        part: str = "",
        *,
        after: int = 0,
        times: int = 10**9,
        status: int = 0,
        code: str = "InternalError",
        seconds: float = 0.0,
        action: str = "",
    ) -> None:
        """Lets requests fail from now on.

        Args:
            method: Of the requests; "" for any.
            part: What their path and query contain.
            after: So many of them still succeed.
            times: So many fail.
            status: How the server answers, with ``code``; 0 cuts the connection; 200 only waits.
            code: The code of S3 in the answer.
            seconds: How long the server waits before that.
            action: In place of ``status``: "half" sends half of the answer and cuts the connection,
                "whole" sends the whole object whatever range was asked for.
        """
        rule = {
            **{"method": method, "part": part, "after": after, "times": times},
            **{"status": status, "code": code, "seconds": seconds},
            "action": action,
        }
        self._ask("_control/fail", "POST", json.dumps(rule).encode())

    def recover(self) -> None:
        """Lets all requests succeed again."""
        self._ask("_control/recover", "POST", b"{}")

    def requests(self) -> list[str]:
        """All requests so far, as method, path and query."""
        found: list[str] = json.loads(self._ask("_control/requests", "POST", b"{}"))
        return found

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Bytes of every object of a bucket, by key."""
        from xml.etree import ElementTree

        found: dict[str, int] = {}
        token = ""
        while True:
            text = self._ask(f"{bucket}?list-type=2&prefix={quote(prefix)}{token}", "GET")
            tree = ElementTree.fromstring(text)
            space = {"s": tree.tag[1:].partition("}")[0]}
            for one in tree.findall("s:Contents", space):
                key, size = (one.findtext(f"s:{name}", "", space) for name in ("Key", "Size"))
                found[key] = int(size)
            if not (more := tree.findtext("s:NextContinuationToken", "", space)):
                return found
            token = f"&continuation-token={quote(more)}"

    def uploads(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that were begun and neither completed nor aborted."""
        from xml.etree import ElementTree

        tree = ElementTree.fromstring(self._ask(f"{bucket}?uploads", "GET"))
        space = {"s": tree.tag[1:].partition("}")[0]}
        return [one.findtext("s:Key", "", space) for one in tree.findall("s:Upload", space)]

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _ask(self, path: str, method: str, body: bytes | None = None) -> bytes:
        request = Request(f"{self.endpoint}/{path}", body, method=method)
        # moto reads the region from it, and checks nothing else.
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=testing/1/us-east-1/s3/x")
        with urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs a server, which drivers in this process and in processes it starts take for Amazon's."""
    server = S3Server()
    try:
        with patch.dict(os.environ, server.environment):
            os.environ.pop("AWS_PROFILE", None)
            yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        # A driver keeps its connections, and the next server may get the same port.
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()


class _Faulty:
    """A WSGI application that counts requests and lets some fail."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.rules: list[dict[str, Any]] = []
        self.requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.startswith(_CONTROL):
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._control(path, json.loads(body))).encode()]
        query = environ.get("QUERY_STRING", "")
        asked = f"{path}?{query}" if query else path
        self.requests.append(f"{method} {asked}")
        for rule in self.rules:
            if rule["method"] not in ("", method) or rule["part"] not in asked:
                continue
            if rule["after"] > 0:
                rule["after"] -= 1
            elif rule["times"] > 0:
                rule["times"] -= 1
                time.sleep(rule["seconds"])
                if rule["action"] == "half":
                    return self._half(environ, start_response)
                if rule["action"] == "whole":
                    environ.pop("HTTP_RANGE", None)
                elif rule["status"] != 200:
                    return self._fail(rule, environ, start_response)
        return self.application(environ, start_response)

    def _control(self, path: str, value: dict[str, Any]) -> Any:
        if path.endswith("/fail"):
            self.rules.append(value)
        elif path.endswith("/recover"):
            self.rules.clear()
        return self.requests

    def _half(self, environ: dict[str, Any], start_response: Any) -> Any:
        import socket

        content = b"".join(self.application(environ, start_response))
        yield content[: len(content) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError

    def _fail(self, rule: dict[str, Any], environ: dict[str, Any], start_response: Any) -> Any:
        if not rule["status"]:
            import socket

            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        # What was sent is read, or the client would see a cut connection instead.
        if environ.get("HTTP_TRANSFER_ENCODING", "").lower() != "chunked":
            left = int(environ.get("CONTENT_LENGTH") or 0)
            while left > 0 and (got := environ["wsgi.input"].read(min(left, 1 << 20))):
                left -= len(got)
        text = f"<Error><Code>{rule['code']}</Code><Message>as asked</Message></Error>"
        start_response(f"{rule['status']} Refused", [("Content-Type", "application/xml")])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else text.encode()]


def _serve(port: int) -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    application = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", port, application, threaded=True)
    os.environ["MOTO_PORT"] = str(server.server_port)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    # Not this folder: its modules have names of packages.
    sys.path = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent
    ]
    _serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
