"""Where the files of a checkpoint are: a local folder, or a repository whose headers were read.

An opener asks a `Folder` and need not know which of the two it is.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from llamaconv.checkpoint.digests import Digest
from llamaconv.checkpoint.hub_address import HubFile
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.untrusted.files import read_json
from llamaconv.report.errors import Problem, RefusedError, collect_problems

Header = tuple[dict[str, TensorInfo], list[Problem]]
"""The tensors of one file by name, and every problem found."""


class Folder(Protocol):
    """Files by bare names, never by a path."""

    @property
    def path(self) -> Path | HubFile:
        """The folder; ``path / name`` names a file in messages."""

    def names(self) -> list[str]:
        """Return the names of its files and folders, sorted."""

    def is_file(self, name: str) -> bool:
        """Return whether it has a file of this name."""

    def why_no_file(self, name: str) -> str:
        """Return why `is_file` says no, as the rest of a sentence."""

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON object. Raises `RefusedError` if the file holds anything else."""

    def read_header(self, name: str) -> Header:
        """Read the header of one file of weights."""


class RemoteFolder(Folder, Protocol):
    """A `Folder` on another machine, at one commit.

    Attributes:
        files: Bytes of each file, by its path in the folder.
        digests: Digest of each file that has one.
        has_ranges: Whether its host sends the part of a file that it is asked for, as far as known.
    """

    files: dict[str, int]
    digests: dict[str, Digest]
    has_ranges: bool

    @property
    def path(self) -> HubFile:
        """The folder."""

    def start_of(self, name: str) -> bytes:
        """Return the bytes before the tensors of a file whose header was read."""


def matching(folder: Folder, pattern: str) -> list[str]:
    """Return the names in ``folder`` that match a shell pattern, sorted."""
    return [name for name in folder.names() if fnmatchcase(name, pattern)]


def try_json_in(folder: Folder, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    """Read one JSON object; return None and add to ``problems`` if that is refused."""
    return collect_problems(lambda: folder.read_json(name), problems)


# Errors that mean "no such file". A name that is too long for any file is one of them.
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class LocalFolder:
    """A local `Folder`; ``read_header`` reads one of its files."""

    def __init__(self, path: Path, read_header: Callable[[Path], Header]) -> None:
        self.path = path
        self._read_header = read_header

    def names(self) -> list[str]:
        """Return the names of its files and folders, sorted."""
        return sorted(entry.name for entry in self.path.iterdir())

    def is_file(self, name: str) -> bool:
        """Return whether it has a file of this name.

        Raises:
            RefusedError: The disk cannot tell, which is not the same as no.
        """
        path = self.path / name
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except ValueError:
            return False
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                return False
            raise RefusedError(f"{path}: {error.strerror or error}") from error

    def why_no_file(self, name: str) -> str:
        """Return why `is_file` says no, as the rest of a sentence."""
        path = self.path / name
        try:
            is_link = stat.S_ISLNK(path.lstat().st_mode)
        except (OSError, ValueError):
            return "not found"
        try:
            path.stat()
        except OSError:
            return f"a link to {path.readlink()}, which does not exist" if is_link else "not found"
        return "not a file"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON object. Raises `RefusedError` if the file holds anything else."""
        return read_json(self.path / name)

    def read_header(self, name: str) -> Header:
        """Read the header of one file of weights."""
        return self._read_header(self.path / name)
