"""Read small untrusted files: JSON with bounds, and what a file really is."""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llamaconv.report.errors import Problem, RefusedError, collect_problems

# Far above any index or configuration in use (405B: 1,138 tensors, 100 kB).
_MOST_JSON_BYTES = 100_000_000
# Each takes 100 bytes of memory or more. The largest mixtures of experts have some 90,000 tensors.
_MOST_JSON_VALUES = 5_000_000
# Far below the depth of recursion that Python allows when the values are shown or compared.
_MOST_JSON_DEPTH = 64


def what_it_is(start: bytes) -> str | None:
    """Guess from a file's first bytes why it is not what its name says; return None if unknown."""
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git-LFS pointer, not the weights; fetch them with 'git lfs pull'"
    head = start[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return (
            "this is an HTML page, not the file; the download failed (a gated model needs a login)"
        )
    if start.startswith(b"PK\x03\x04"):
        return "this is a zip archive, as torch.save writes"
    return None


class ByteSource(Protocol):
    """The bytes of one file, wherever it is."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""

    def read(self, first: int, n_bytes: int) -> bytes:
        """Return bytes from byte ``first`` on; fewer only if the file ends. Raises ``OSError``."""

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Announce spans (first byte, and the byte after the last) that are going to be read.

        It is a hint: a file on another machine may fetch them together.
        """


class LocalBytes:
    """A `ByteSource` of an open file here."""

    def __init__(self, file: BinaryIO) -> None:
        """Read ``file``, which stays open."""
        self._descriptor = file.fileno()

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, first: int, n_bytes: int) -> bytes:
        """Return bytes from byte ``first`` on; fewer only if the file ends. Raises ``OSError``."""
        content = b""
        while len(content) < n_bytes:
            got = os.pread(self._descriptor, n_bytes - len(content), first + len(content))
            if not got:
                break
            content += got
        return content

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Do nothing: the system reads ahead."""

    def mapped(self) -> mmap.mmap:
        """Map the whole file. Raises ``OSError`` if its filesystem cannot."""
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)


@contextmanager
def open_bytes(path: Path) -> Iterator[LocalBytes]:
    """Open ``path`` as a `ByteSource`; raises what `open_file` does."""
    with open_file(path) as file:
        yield LocalBytes(file)


def open_file(path: Path) -> BinaryIO:
    """Open ``path`` for reading.

    Raises:
        OSError: It cannot be opened, or is a pipe, a device or a folder, whose reading might
            never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises `RefusedError` if the file holds anything else."""
    try:
        with open_file(path) as file:
            check_json_size(path, os.fstat(file.fileno()).st_size)
            content = file.read(_MOST_JSON_BYTES)
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror or error}") from error
    return json_object(path, content)


def check_json_size(path: object, n_bytes: int) -> None:
    """Raise `RefusedError` if a file is too long to be an index or a configuration."""
    if n_bytes > _MOST_JSON_BYTES:
        raise RefusedError(f"{path}: {n_bytes} bytes; no index or configuration is that long")


def json_object(path: object, content: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises `RefusedError`, which names ``path``, for anything else."""
    try:
        entries = parse_json(content)
    except ValueError as error:
        reason = what_it_is(content[:512]) or f"not valid JSON: {error}"
        raise RefusedError(f"{path}: {reason}") from error
    if not isinstance(entries, dict):
        raise RefusedError(f"{path}: expected a JSON object, found {type(entries).__name__}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} appears twice")
    return entries


def parse_json(text: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: It is not valid, too large or too deep, or a name appears twice in an object.
    """
    # Count before parsing: each of these bytes may become an object in memory.
    if sum(map(text.count, (b"[", b"{", b","))) > _MOST_JSON_VALUES:
        raise ValueError(f"more than {_MOST_JSON_VALUES} values")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if _is_deep(value):
        raise ValueError("nested too deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_JSON_DEPTH):
        nested = [one for one in level if isinstance(one, dict | list)]
        if not nested:
            return False
        level = [
            inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return True


def try_json(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """Do what `read_json` does; if it refuses, return None and add to ``problems``."""
    return collect_problems(lambda: read_json(path), problems)
