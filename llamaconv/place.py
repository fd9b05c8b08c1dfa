"""Where the files of a checkpoint lie: a folder here, or a repository of which headers are read.

An opener asks a `Place` and need not know which of the two it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from llamaconv.files import read_json
from llamaconv.pieces import TensorInfo
from llamaconv.problems import Problem, RefusedError, or_problems
from llamaconv.remote import Remote

Header = tuple[dict[str, TensorInfo], list[Problem]]
"""The tensors of one file, and every problem found."""


class Place(Protocol):
    """Files by bare names, never by a path."""

    @property
    def path(self) -> Path | Remote:
        """The folder; ``path / name`` names a file in messages."""

    def names(self) -> list[str]:
        """What lies directly in it, in the order of the alphabet."""

    def is_file(self, name: str) -> bool: ...

    def why_no_file(self, name: str) -> str:
        """What to say of ``name`` where `is_file` says no."""

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON object. Raises `RefusedError` where it is something else."""

    def read_header(self, name: str) -> Header:
        """Tensors of one file of weights, without reading any."""


def matching(place: Place, pattern: str) -> list[str]:
    """Names in ``place`` that fit a shell pattern, in the order of the alphabet."""
    return [name for name in place.names() if fnmatchcase(name, pattern)]


def try_json(place: Place, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    """`Place.read_json`, with a refusal added to ``problems`` instead of raised."""
    return or_problems(lambda: place.read_json(name), problems)


# Answers by which a file is not there, a name that is too long for any file's among them.
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class LocalFolder:
    """A folder here; ``read_header`` reads one of its files."""

    def __init__(self, path: Path, read_header: Callable[[Path], Header]) -> None:
        self.path = path
        self._read_header = read_header

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def is_file(self, name: str) -> bool:
        """Raises `RefusedError` where the disk cannot tell: that is not the same as no."""
        path = self.path / name
        try:
            return stat.S_ISREG(os.stat(path).st_mode)
        except ValueError:
            return False
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return False
            raise RefusedError(f"{path}: {error.strerror or error}") from error

    def why_no_file(self, name: str) -> str:
        path = self.path / name
        if os.path.islink(path) and not os.path.exists(path):
            return f"is a link to {path.readlink()}, which is not there"
        return "is not a file" if os.path.exists(path) else "is not there"

    def read_json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    def read_header(self, name: str) -> Header:
        return self._read_header(self.path / name)
