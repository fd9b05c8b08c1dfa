"""Repositories of the Hugging Face Hub: what they list, and the headers of their files.

One request lists a repository at one commit, and everything after is of that commit. Of a file of
weights the first 32 KiB are asked for, a header of some 300 tensors; a longer one takes a
second request. Weights are never read, nor is anything written to a cache. All requests go
through huggingface_hub's own session, so that HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
proxies mean what they mean there.

Limit: models only, and files that lie directly in the repository.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llamaconv.files import check_json_size, json_object, what_it_is
from llamaconv.formats.hub_errors import (
    LOG_IN,
    as_refusals,
    check_endpoint,
    client_error,
    host,
    is_timeout,
    refused,
)
from llamaconv.formats.safetensors_header import header_end, parse_header
from llamaconv.place import Header
from llamaconv.problems import RefusedError
from llamaconv.remote import HubName, Remote
from llamaconv.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_FIRST_BYTES = 32 * 1024
_REQUESTS_AT_ONCE = 16
# A busy server is asked again after so many seconds; a limit on the rate is not waited for.
_WAITS = (0.5, 2.0)
_BUSY = (408, 500, 502, 503, 504)

# What the extra called hub installs.
_INSTALL = "pip install 'huggingface_hub>=1.3,<3'"


class Repository:
    """A `Place` on the Hub: names and sizes as listed, and what `fetch` was asked for.

    ``files`` maps every file of the repository, folders included, to its bytes.
    """

    def __init__(
        self, name: HubName, commit: str, files: dict[str, int], headers: dict[str, str]
    ) -> None:
        pinned = HubName(name.repo, commit)
        self.repo = name.repo
        self.commit = commit
        self.files = files
        self.path = Remote(str(pinned), f"{name.repo}@{commit[:7]}", commit, pinned.download())
        self._request_headers = headers
        self._json: dict[str, bytes] = {}
        self._headers: dict[str, Header] = {}

    def names(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.files})

    def is_file(self, name: str) -> bool:
        return "/" not in name and name in self.files

    def why_no_file(self, name: str) -> str:
        return "is a folder" if name in self.names() else "is not there"

    def read_json(self, name: str) -> dict[str, Any]:
        check_json_size(self.path / name, self.files[name])
        return json_object(self.path / name, self._json[name])

    def read_header(self, name: str) -> Header:
        return self._headers[name]

    def fetch(self, headers: Sequence[str], json_files: Sequence[str]) -> None:
        """Gets the headers of some files and the whole of others, many at once.

        Raises `RefusedError` for the first that the Hub does not give. What is wrong inside a
        file is a problem of its header, as with files that lie here.
        """
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            heads = {name: pool.submit(self._header, name) for name in headers}
            texts = {name: pool.submit(self._whole, name) for name in json_files}
            try:
                self._headers |= {name: future.result() for name, future in heads.items()}
                self._json |= {name: future.result() for name, future in texts.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _header(self, name: str) -> Header:
        n_bytes = self.files[name]
        start = self._start(name, wanted := min(n_bytes, _FIRST_BYTES))
        end = header_end(start, n_bytes)
        if end is not None and end > wanted:
            start = self._start(name, wanted := end)
        self._check_length(name, start, wanted)
        return parse_header(self.path / name, start, n_bytes)

    def _whole(self, name: str) -> bytes:
        n_bytes = self.files[name]
        try:
            check_json_size(self.path / name, n_bytes)
        except RefusedError:
            return b""  # `read_json` says so, as one problem among others
        content = self._start(name, n_bytes)
        self._check_length(name, content, n_bytes)
        return content

    def _check_length(self, name: str, start: bytes, wanted: int) -> None:
        # A web page, which is shorter, says itself what it is.
        if len(start) < wanted and not (start and what_it_is(start)):
            raise RefusedError(
                f"{self.path / name}: {host()} sent {len(start)} bytes of {wanted} and ended; "
                "try again"
            )

    def _start(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of a file, fewer where the server sends fewer; asks again if it is busy."""
        if n_bytes == 0:
            return b""  # no range lies in an empty file
        for wait in (*_WAITS, None):
            with as_refusals(self.path / name):
                try:
                    status, headers, start = self._ask(name, n_bytes)
                except client_error() as error:
                    if wait is None or is_timeout(error):
                        raise
                    status = _BUSY[0]
                if status < 400:
                    return start
                if status not in _BUSY or wait is None:
                    raise refused(self.path / name, self.repo, status, headers)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _ask(self, name: str, n_bytes: int) -> tuple[int, Mapping[str, str], bytes]:
        from huggingface_hub import constants, get_session, hf_hub_url

        url = hf_hub_url(self.repo, name, revision=self.commit)
        # Compressed bytes would be other ones than those that the range is of.
        headers = {
            **self._request_headers,
            "range": f"bytes=0-{n_bytes - 1}",
            "accept-encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            start = bytearray()
            if answer.status_code < 400:
                # A server that knows no ranges sends the whole file: stop where it is enough.
                for block in answer.iter_bytes():
                    start += block
                    if len(start) >= n_bytes:
                        break
            return answer.status_code, answer.headers, bytes(start[:n_bytes])


def connect(name: HubName) -> Repository:
    """The repository ``name`` as it is now, by one request.

    Raises `RefusedError` where huggingface_hub is not installed, the Hub cannot be reached, or it
    has no such repository, revision, or permission for it.
    """
    check_endpoint(os.environ.get("HF_ENDPOINT"))
    try:
        from huggingface_hub import __version__ as installed

        if int(installed.split(".")[0]) < 1:
            raise ImportError(installed)  # its session is another one
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    except ImportError as error:
        raise RefusedError(
            f"{name}: reading from the Hub needs huggingface_hub 1.3 or later: {_INSTALL}"
        ) from error
    with as_refusals(name):
        headers = build_hf_headers(library_name="llamaconv", library_version=__version__)
        token = headers.get("authorization", "")
        if not (token.isascii() and token.isprintable()):
            # The HTTP client would show it in its error.
            raise RefusedError(f"{name}: the token has characters that no token has; {LOG_IN}")
        try:
            info = HfApi(library_name="llamaconv", library_version=__version__).model_info(
                name.repo,
                revision=name.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            return Repository(name, *_listed(info), headers)
        except HfHubHTTPError as error:
            answer = error.response
            raise refused(name, name.repo, answer.status_code, answer.headers) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RefusedError(
                f"{name}: {host()} answers, but not as the Hub does; look at HF_ENDPOINT, or for "
                "a proxy that wants a login"
            ) from error


def _listed(info: ModelInfo) -> tuple[str, dict[str, int]]:
    """Commit, and bytes of each file. Raises ``ValueError`` for an answer that has them not."""
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
        raise ValueError("no commit")
    files: dict[str, int] = {}
    for file in info.siblings or []:
        if type(file.size) is not int or file.size < 0 or type(file.rfilename) is not str:
            raise ValueError("no name or no size")
        files[file.rfilename] = file.size
    return info.sha, files
