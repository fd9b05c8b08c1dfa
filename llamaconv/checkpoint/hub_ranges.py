"""Byte ranges of the files of one repository of the Hub, at one commit.

The Hub answers the first request for a file with the address of the host that has it, which is
remembered and asked for the further ranges until it refuses (such addresses expire after hours).
A connection that was cut goes on at the byte that is missing. Whoever gets nothing at all for a
minute gives up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.hub_errors import as_refusals, host, refused
from llamaconv.report.errors import STOPPED, FailedError, RefusedError

# Seconds before a host is asked again that did not send a byte.
WAITS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_LONGEST_WAIT = 300
BUSY = (408, 429, 500, 502, 503, 504)
"""Answers of a host that is to be asked again."""


class HubRanges:
    """A `llamaconv.checkpoint.hub_address.ByteRanges`. Threads may share it."""

    def __init__(
        self, repo: str, commit: str, files: Mapping[str, int], headers: Mapping[str, str]
    ) -> None:
        """Read ``repo`` at ``commit``.

        Args:
            repo: ``ORG/NAME``.
            commit: The commit, in full.
            files: Bytes of each file.
            headers: What every request to the Hub says, such as the token.
        """
        self._repo = repo
        self._commit = commit
        self._files = files
        self._headers = headers
        self._addresses: dict[str, str] = {}

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        """Fill ``out`` with the bytes of the file ``name`` from byte ``first`` on.

        Raises:
            FailedError: The Hub refused, or sent nothing for about a minute; or ``stop`` was set.
        """
        done, tries = 0, 0
        while done < len(out):
            request = _Request(self, name, first + done, out[done:], stop)
            error = request.run()
            done += request.done
            if stop.is_set():
                raise FailedError(STOPPED)
            if error is None:
                continue
            if request.done:
                tries = 0
            if request.is_fatal or tries == len(WAITS):
                gave_up = "" if request.is_fatal else f" ({tries + 1} attempts)"
                raise FailedError(f"{error.problems[0].message}{gave_up}") from error
            stop.wait(max(WAITS[tries], request.retry_after))
            tries += 1

    def address(self, name: str) -> tuple[str, dict[str, str]]:
        """Return where a file is, and the headers of a request."""
        from huggingface_hub import hf_hub_url

        known = self._addresses.get(name) or hf_hub_url(self._repo, name, revision=self._commit)
        headers = dict(self._headers)
        if not self.is_hub(known):
            # The token is for the Hub alone.
            headers.pop("authorization", None)
        return known, headers

    def is_hub(self, address: str) -> bool:
        """Return whether an address is the Hub's own, and not that of the host of a file."""
        from huggingface_hub import constants

        return urlsplit(address)[:2] == urlsplit(constants.ENDPOINT)[:2]

    def found(self, name: str, address: str | None) -> None:
        """Remember the address of a file, or forget it."""
        if address is None:
            self._addresses.pop(name, None)
        else:
            self._addresses[name] = address

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._files[name]

    def where(self, name: str) -> str:
        """Return what to call a file in messages."""
        return f"{HubAddress(self._repo, self._commit)}/{name}"

    def refusal(self, name: str, status: int, headers: Mapping[str, str]) -> RefusedError:
        """Return what an answer of ``status`` means."""
        return refused(self.where(name), self._repo, status, headers)


class _Request:
    """One request for a range.

    Attributes:
        done: Bytes received.
        is_fatal: Whether asking again would not help.
        retry_after: Seconds that the host asks to wait.
    """

    def __init__(
        self, source: HubRanges, name: str, first: int, out: memoryview, stop: threading.Event
    ) -> None:
        self.source, self.name, self.first, self.out, self.stop = source, name, first, out, stop
        self.done = 0
        self.is_fatal = False
        self.retry_after = 0.0

    def run(self) -> RefusedError | None:
        """Receive what comes; return why it is not all."""
        try:
            with as_refusals(self.source.where(self.name)):
                self._ask()
        except RefusedError as error:
            return error
        return None

    def _ask(self) -> None:
        from huggingface_hub import constants, get_session

        address, headers = self.source.address(self.name)
        # A range of compressed bytes would not be the range that is needed.
        headers |= {
            "range": f"bytes={self.first}-{self.first + len(self.out) - 1}",
            "accept-encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", address, headers=headers, timeout=timeout) as answer:
            if answer.status_code >= 400:
                is_hub = self.source.is_hub(str(answer.url))
                self._refuse(answer.status_code, answer.headers, is_hub)
            self._check(answer.status_code, answer.headers)
            self.source.found(self.name, str(answer.url))
            for block in answer.iter_raw():
                if self.stop.is_set():
                    return
                some = block[: len(self.out) - self.done]
                self.out[self.done : self.done + len(some)] = some
                self.done += len(some)
        if self.done < len(self.out):
            raise RefusedError(
                f"{self.source.where(self.name)}: {host()} sent only {self.done} of "
                f"{len(self.out)} bytes"
            )

    def _refuse(self, status: int, headers: Mapping[str, str], is_hub: bool) -> None:
        self.source.found(self.name, None)
        # Addresses expire: their host refuses, and the Hub then gives another. The Hub means it.
        self.is_fatal = status not in BUSY and is_hub
        wait = headers.get("retry-after", "")
        self.retry_after = min(int(wait), _LONGEST_WAIT) if wait.isdecimal() else 0.0
        raise self.source.refusal(self.name, status, headers)

    def _check(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise `RefusedError` if the answer is not the range that was asked for."""
        size = self.source.size(self.name)
        last = self.first + len(self.out) - 1
        whole = status == 200 and self.first == 0 and len(self.out) == size
        if whole or headers.get("content-range", "") == f"bytes {self.first}-{last}/{size}":
            return
        self.is_fatal = True
        where = self.source.where(self.name)
        if status == 200:
            raise RefusedError(
                f"{where}: the host answers with the whole file, not with the range that is needed, "
                "perhaps by way of a proxy. Download the repository and convert the folder"
            )
        raise RefusedError(
            f"{where}: the host sent {headers.get('content-range') or 'no range'} of the file "
            f"instead of {self.first}-{last}/{size}. Try again, or download the repository"
        )
