"""Stores by their addresses: the filesystem of fsspec for each, and ranges of their files.

fsspec finds the driver: s3fs, gcsfs, adlfs, huggingface_hub and others. Credentials, endpoints and
regions are theirs, from their own environment and configuration. A driver is imported if an
address needs it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_errors import as_refusals, explain
from llamaconv.report.errors import STOPPED, FailedError, RefusedError

# Loggers of drivers, which would write the tracebacks of what is reported in one line.
_LOGGERS = (
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "aiobotocore",
    "botocore",
    "azure",
    "google",
    "asyncio",
)
_SILENT = logging.NullHandler()
# What the extras of pyproject.toml install.
_DRIVERS = {
    "s3": "s3fs>=2024.12",
    "s3a": "s3fs>=2024.12",
    "gs": "gcsfs>=2024.12",
    "gcs": "gcsfs>=2024.12",
    "az": "adlfs>=2024.12",
    "abfs": "adlfs>=2024.12",
    "abfss": "adlfs>=2024.12",
    "hf": "huggingface_hub>=1.3,<3",
}
# Seconds before a store is asked again that failed without sending a byte; drivers retry as well.
WAITS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
# A request that takes longer has died without its driver noticing.
_LONGEST_REQUEST = 300.0
# Filesystems of fsspec that are not asynchronous, and whose methods threads may call at once.
_SHAREABLE = ("memory", "hf", "local", "file")
_REQUESTS_AT_ONCE = 32
# What a listing says about the state of a file; drivers name it differently.
_STATE = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "VersionId", "version_id"),
    *("xet_hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created"),
)

State = tuple[int, tuple[str, ...]]
"""Bytes of a file, and what its store says about its version."""


def filesystem(address: StoreAddress) -> tuple[Any, str]:
    """Return fsspec's filesystem for an address, and the path in it.

    Raises:
        RefusedError: fsspec or the driver is not installed, or it cannot be used as it is
            configured.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise RefusedError(f"{address}: stores need fsspec: pip install 'fsspec'") from error
    for name in _LOGGERS:
        # Who has set up logging still gets all.
        logging.getLogger(name).addHandler(_SILENT)
    try:
        with as_refusals(address, address):
            fs, path = url_to_fs(address.url)
    except RefusedError as error:
        if isinstance(error.__cause__, ImportError):
            raise RefusedError(_without_driver(address, error.__cause__)) from error
        raise
    return fs, str(path).rstrip("/") or "/"


def _without_driver(address: StoreAddress, error: ImportError) -> str:
    begin = f"{address}: addresses that begin with {address.scheme}:// need a driver of fsspec"
    if driver := _DRIVERS.get(address.scheme):
        return f"{begin}: pip install '{driver}'"
    return f"{begin}: {error}"


def listing(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Return what a store lists in a folder now, by bare names. Raises what the driver raises."""
    fs.invalidate_cache(path)
    found = {}
    for info in fs.ls(path, detail=True):
        whole = str(info["name"]).rstrip("/")
        if whole.strip("/") != path.strip("/") or info.get("type") == "file":
            found[whole.rpartition("/")[2]] = info
    return found


def state_of(info: Mapping[str, Any]) -> State:
    """Return what a listing says about the state of a file."""
    said = tuple(f"{name} {info[name]}" for name in _STATE if info.get(name) is not None)
    return int(info.get("size") or 0), said


class StoreRanges:
    """A `llamaconv.checkpoint.remote_file.ByteRanges` of the files of one folder of a store.

    Threads may share it. What `fetch` got stays in memory until `forget`.
    """

    def __init__(
        self,
        address: StoreAddress,
        fs: Any,
        path: str,
        files: Mapping[str, int],
        overlay: Mapping[str, bytes],
    ) -> None:
        """Read a folder.

        Args:
            address: The folder, for messages.
            fs: Its filesystem of fsspec.
            path: The folder in ``fs``.
            files: Bytes of each file.
            overlay: Files whose content is known, and which are not asked for.
        """
        self._address = address
        self._fs = fs
        self._path = path
        self._files = files
        self._overlay = overlay
        self._kept: dict[str, list[tuple[int, bytes]]] = {}
        protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
        self._one_at_a_time = None if _is_shareable(fs, protocols) else threading.Lock()
        # A file of huggingface_hub's filesystem would otherwise be read ahead once more.
        self._options = {"cache_type": "none"} if "hf" in protocols else {}

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._files[name]

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        """Fill ``out`` with the bytes of the file ``name`` from byte ``first`` on.

        Raises:
            FailedError: The store refused, or failed repeatedly; or ``stop`` was set.
        """
        self._read_into(name, first, out, stop, WAITS)

    def _read_into(
        self,
        name: str,
        first: int,
        out: memoryview,
        stop: threading.Event,
        waits: Sequence[float],
    ) -> None:
        if (kept := self._known(name, first, first + len(out))) is not None:
            out[:] = kept
            return
        done, tries = 0, 0
        while done < len(out):
            where, problem, is_fatal = f"{self._address / name}", "", False
            cause: Exception | None = None
            try:
                got = self._request(name, first + done, first + len(out), stop)
            except FailedError:
                raise
            except Exception as error:
                reason = explain(error, self._address)
                problem, is_fatal, cause = reason.text, not reason.is_transient, error
            else:
                if len(got) > len(out) - done:
                    raise FailedError(f"{where}: {self._no_ranges()}")
                out[done : done + len(got)] = got
                done += len(got)
                if got:
                    tries = 0
                    continue
                problem = f"ends {len(out) - done} bytes early; was it replaced?"
            if stop.is_set():
                raise FailedError(STOPPED)
            if is_fatal or tries == len(waits):
                gave_up = "" if is_fatal else f" ({tries + 1} attempts)"
                raise FailedError(f"{where}: {problem}{gave_up}") from cause
            stop.wait(waits[tries])
            tries += 1

    def read(self, name: str, first: int, last: int, stop: threading.Event | None = None) -> bytes:
        """Return bytes ``first`` to ``last`` (half-open) of a file, while a folder is opened.

        Raises:
            RefusedError: They could not be fetched, or ``stop`` was set.
        """
        out = bytearray(last - first)
        try:
            # Somebody waits for it, and drivers have tried again already.
            self._read_into(name, first, memoryview(out), stop or threading.Event(), WAITS[:1])
        except FailedError as error:
            raise RefusedError(error.problems) from error
        return bytes(out)

    def fetch(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Fetch parts of files, many at once, and keep them in memory.

        Args:
            parts: Name of the file, first byte, and the byte after the last. What is close together
                comes in one request.

        Raises:
            RefusedError: They could not be fetched.
        """
        wanted = [part for part in joined(parts) if self._known(part[0], part[1], part[2]) is None]
        if not wanted:
            return
        stop = threading.Event()
        with ThreadPoolExecutor(min(_REQUESTS_AT_ONCE, len(wanted))) as pool:
            jobs = [(part, pool.submit(self.read, *part, stop)) for part in wanted]
            try:
                for (name, first, _), job in jobs:
                    self._kept.setdefault(name, []).append((first, job.result()))
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for kept in self._kept.values():
            kept.sort()

    def forget(self) -> None:
        """Let go of what `fetch` got."""
        self._kept.clear()

    def check_ranges(self) -> None:
        """Raise `RefusedError` if the store sends more than the range that it is asked for.

        A smallest file tells, so that no model is fetched whole because of that.
        """
        files = [
            (n, name) for name, n in self._files.items() if n > 1 and name not in self._overlay
        ]
        if files:
            self.read(min(files)[1], 0, 1)

    def _no_ranges(self) -> str:
        return (
            "the store answers with more than the range that is needed, perhaps by way of a proxy. "
            "Copy the folder here and convert that"
        )

    def _known(self, name: str, first: int, last: int) -> bytes | memoryview | None:
        """Return bytes that need not be asked for; None if there are none."""
        if name in self._overlay:
            content = self._overlay[name][first:last]
            return content if len(content) == last - first else None
        kept = self._kept.get(name, ())
        low, high = 0, len(kept)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if kept[middle][0] <= first else (low, middle)
        if low:
            begin, content = kept[low - 1]
            if last <= begin + len(content):
                return memoryview(content)[first - begin : last - begin]
        return None

    def _request(self, name: str, first: int, last: int, stop: threading.Event) -> bytes:
        """Ask the driver once. Raises what it raises, or `FailedError` if ``stop`` was set."""
        path = f"{self._path.rstrip('/')}/{name}"
        if self._one_at_a_time is not None:
            with self._one_at_a_time:
                return bytes(self._fs.cat_file(path, first, last))
        if not self._fs.async_impl:
            return bytes(self._fs.cat_file(path, first, last, **self._options))
        asked = self._fs._cat_file(path, start=first, end=last)
        future = asyncio.run_coroutine_threadsafe(asked, self._fs.loop)
        until = time.monotonic() + _LONGEST_REQUEST
        while True:
            try:
                return bytes(future.result(0.5))
            except TimeoutError:
                if future.done():
                    raise
                if stop.is_set():
                    future.cancel()
                    raise FailedError(STOPPED) from None
                if time.monotonic() > until:
                    future.cancel()
                    raise TimeoutError(f"no range within {_LONGEST_REQUEST:g} s") from None


def _is_shareable(fs: Any, protocols: Iterable[str]) -> bool:
    return fs.async_impl or any(one in _SHAREABLE for one in protocols)


# A request costs a round trip; this much is sent in less time than that.
_GAP_BYTES = 64 * 1024


def joined(parts: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return parts of files in order, with those joined that are close together."""
    found: list[tuple[str, int, int]] = []
    for name, first, last in sorted(parts):
        if found and found[-1][0] == name and first - found[-1][2] <= _GAP_BYTES:
            found[-1] = (name, found[-1][1], max(found[-1][2], last))
        elif first < last:
            found.append((name, first, last))
    return found
