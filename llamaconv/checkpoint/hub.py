"""Repositories of the Hugging Face Hub: what they list, and the headers of their files.

One request lists a repository at one commit, and all later requests ask for that commit. The first
request for a file of weights asks for 32 KiB, the header of some 300 tensors; a longer header takes
a second request. 405B in 191 files takes 193 requests and some 6 MB. Weights are read by
`hub_ranges` if a conversion needs them, and nothing is written to a cache. All requests use huggingface_hub's session, so login, endpoint and
proxy are those of huggingface_hub (``hf auth login``, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).

Limit: models only, and files at the top of the repository.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llamaconv import __version__
from llamaconv.checkpoint.digests import Digest
from llamaconv.checkpoint.folder import Header
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.hub_errors import (
    LOG_IN,
    as_refusals,
    check_endpoint,
    client_error,
    host,
    is_timeout,
    refused,
)
from llamaconv.checkpoint.hub_ranges import HubRanges
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.untrusted.files import check_json_size, json_object, what_it_is
from llamaconv.checkpoint.untrusted.safetensors_header import header_end, parse_header
from llamaconv.report.errors import Problem, RefusedError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_FIRST_BYTES = 32 * 1024
_REQUESTS_AT_ONCE = 16
# Seconds before a busy server is asked again. A rate limit is reported at once.
_WAITS = (0.5, 2.0)
_BUSY = (408, 500, 502, 503, 504)

# What the extra called hub installs.
_INSTALL = "pip install 'huggingface_hub>=1.3,<3'"


class Repository:
    """A `Folder` on the Hub: its files as listed, and the content that `fetch` got.

    Attributes:
        repo: ``ORG/NAME``.
        commit: The commit, in full.
        files: Bytes of each file, by its path in the repository.
        digests: Digest of each file: sha256 of large ones (LFS), else the id of its git blob.
        path: The repository at this commit.
        has_ranges: Whether its host sends the part of a file that it is asked for, as far as known.
    """

    def __init__(
        self,
        name: HubAddress,
        commit: str,
        files: dict[str, int],
        digests: dict[str, Digest],
        headers: dict[str, str],
    ) -> None:
        pinned = HubAddress(name.repo, commit)
        self.repo = name.repo
        self.commit = commit
        self.files = files
        self.digests = digests
        ranges = HubRanges(name.repo, commit, files, headers)
        self.path = RemoteFile(
            str(pinned), f"{name.repo}@{commit[:7]}", commit, pinned.download(), ranges
        )
        self.has_ranges = True
        self._request_headers = headers
        self._json: dict[str, bytes] = {}
        self._headers: dict[str, Header] = {}
        self._starts: dict[str, bytes] = {}

    def names(self) -> list[str]:
        """Return the names of its files and folders, sorted."""
        return sorted({name.split("/")[0] for name in self.files})

    def is_file(self, name: str) -> bool:
        """Return whether it has a file of this name at its top."""
        return "/" not in name and name in self.files

    def why_no_file(self, name: str) -> str:
        """Return why `is_file` says no, as the rest of a sentence."""
        return "a folder" if name in self.names() else "not found"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object that was fetched. Raises `RefusedError` if it is something else."""
        check_json_size(self.path / name, self.files[name])
        return json_object(self.path / name, self._json[name])

    def read_header(self, name: str) -> Header:
        """Return a header that was fetched."""
        return self._headers[name]

    def start_of(self, name: str) -> bytes:
        """Return the bytes before the tensors of a file whose header was fetched."""
        return self._starts[name]

    def version_of(self, name: str) -> Any:
        """Return the digest of a file, or the commit if no digest is listed.

        A later commit may have the same weights.
        """
        return self.digests.get(name, ("commit", self.commit))

    def changed(self) -> list[Problem]:
        """Return nothing: the files of a commit stay what they are."""
        return []

    def fetch(self, headers: Sequence[str], json_files: Sequence[str]) -> None:
        """Request files, many at once.

        Args:
            headers: Files of weights, of which only the header is needed.
            json_files: Files that are needed whole.

        Raises:
            RefusedError: The Hub does not send a file. What is wrong inside a file is a problem
                of its header, as for local files.
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
        self._starts[name] = start[:end] if end else b""
        return parse_header(self.path / name, start, n_bytes)

    def _whole(self, name: str) -> bytes:
        n_bytes = self.files[name]
        try:
            check_json_size(self.path / name, n_bytes)
        except RefusedError:
            return b""  # `read_json` reports it, as one problem among others
        content = self._start(name, n_bytes)
        self._check_length(name, content, n_bytes)
        return content

    def _check_length(self, name: str, start: bytes, wanted: int) -> None:
        # A web page is shorter; `what_it_is` names it later.
        if len(start) < wanted and not (start and what_it_is(start)):
            raise RefusedError(
                f"{self.path / name}: {host()} sent only {len(start)} of {wanted} bytes; try again"
            )

    def _start(self, name: str, n_bytes: int) -> bytes:
        """Return a file's first bytes, fewer if the server sends fewer. Retry if it is busy."""
        if n_bytes == 0:
            return b""  # an empty file has no valid range
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
        # A range of compressed bytes would not be the range that is needed.
        headers = {
            **self._request_headers,
            "range": f"bytes=0-{n_bytes - 1}",
            "accept-encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            start = bytearray()
            if answer.status_code < 400:
                if answer.status_code == 200 and n_bytes < self.files[name]:
                    self.has_ranges = False
                # A server that ignores ranges sends the whole file: stop when there is enough.
                for block in answer.iter_bytes():
                    start += block
                    if len(start) >= n_bytes:
                        break
            return answer.status_code, answer.headers, bytes(start[:n_bytes])


def connect(name: HubAddress) -> Repository:
    """List the repository ``name`` as it is now, with one request.

    Raises:
        RefusedError: huggingface_hub is not installed, the Hub cannot be reached, or it has no
            such repository or revision, or gives no access to it.
    """
    check_endpoint(os.environ.get("HF_ENDPOINT"))
    try:
        from huggingface_hub import __version__ as installed

        if int(installed.split(".")[0]) < 1:
            raise ImportError(installed)  # its session differs
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
            raise RefusedError(f"{name}: the token contains invalid characters; {LOG_IN}")
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
                f"{name}: {host()} does not answer as the Hub does; check HF_ENDPOINT, or whether "
                "a proxy asks for a login"
            ) from error


def _listed(info: ModelInfo) -> tuple[str, dict[str, int], dict[str, Digest]]:
    """Return the commit, and bytes and digest of each file.

    Raises ``ValueError`` if the commit or the bytes are missing. A digest may be.
    """
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
        raise ValueError("no commit")
    files: dict[str, int] = {}
    digests: dict[str, Digest] = {}
    for file in info.siblings or []:
        if type(file.size) is not int or file.size < 0 or type(file.rfilename) is not str:
            raise ValueError("no name or no size")
        files[file.rfilename] = file.size
        kind, value = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
        if type(value) is str and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value):
            digests[file.rfilename] = (kind, value)
    return info.sha, files, digests
