"""Where the files of a checkpoint are: a local folder, or a repository whose headers were read.

An opener asks a `Folder` and need not know which of the two it is.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from llamaconv.checkpoint.digests import Digest
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import Location, TensorInfo
from llamaconv.checkpoint.untrusted.files import ByteSource, open_bytes, read_json
from llamaconv.checkpoint.untrusted.safetensors_header import read_safetensors_header
from llamaconv.checkpoint.untrusted.torch_file import read_torch_header
from llamaconv.report.errors import Problem, RefusedError, collect_problems

Header = tuple[dict[str, TensorInfo], list[Problem]]
"""The tensors of one file by name, and every problem found."""


class Folder(Protocol):
    """Files by bare names, never by a path."""

    @property
    def path(self) -> Path | RemoteFile:
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


class OpenableFolder(Folder, Protocol):
    """A `Folder` whose files can be read at any place."""

    def size_of(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""

    def open(self, name: str) -> AbstractContextManager[ByteSource]:
        """Open a file; entering it raises ``OSError`` if there is none."""

    def fetch(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Have parts of files at hand, soon to be read.

        Args:
            parts: Name of the file, first byte, and the byte after the last.
        """

    def subfolder(self, name: str) -> OpenableFolder:
        """Return a folder in this one, which need not exist."""

    def beside(self, name: str) -> OpenableFolder | None:
        """Return a folder next to this one; None if there is none."""


def read_weights_header(path: Location, opened: AbstractContextManager[ByteSource]) -> Header:
    """Read the header of one file of weights: of safetensors by its name, else of torch.save."""
    read = read_safetensors_header if path.name.endswith(".safetensors") else read_torch_header
    try:
        with opened as source:
            return read(path, source)
    except OSError as error:
        names = () if read is read_safetensors_header else (path.name,)
        return {}, [Problem(f"{path}: {error.strerror or error}", names)]


class RemoteFolder(Folder, Protocol):
    """A `Folder` on another machine.

    Attributes:
        files: Bytes of each file, by its path in the folder.
        digests: Digest of each file that has one.
        has_ranges: Whether its host sends the part of a file that it is asked for, as far as known.
    """

    files: dict[str, int]
    digests: dict[str, Digest]
    has_ranges: bool

    @property
    def path(self) -> RemoteFile:
        """The folder."""

    def start_of(self, name: str) -> bytes:
        """Return the bytes before the tensors of a safetensors file whose header was read."""

    def version_of(self, name: str) -> Any:
        """Return what tells a file of weights from another one of its name; JSON can hold it."""

    def changed(self) -> list[Problem]:
        """Return a problem for each file that was read and is not what it was when it was listed."""


def matching(folder: Folder, pattern: str) -> list[str]:
    """Return the names in ``folder`` that match a shell pattern, sorted."""
    return [name for name in folder.names() if fnmatchcase(name, pattern)]


def try_json_in(folder: Folder, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    """Read one JSON object; return None and add to ``problems`` if that is refused."""
    return collect_problems(lambda: folder.read_json(name), problems)


# Errors that mean "no such file". A name that is too long for any file is one of them.
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class LocalFolder:
    """A local `OpenableFolder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Return the names of its files and folders, sorted."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

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
        return read_weights_header(self.path / name, open_bytes(self.path / name))

    def size_of(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def open(self, name: str) -> AbstractContextManager[ByteSource]:
        """Open a file; entering it raises ``OSError`` if there is none."""
        return open_bytes(self.path / name)

    def fetch(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Do nothing: the files are here."""

    def subfolder(self, name: str) -> LocalFolder:
        """Return a folder in this one, which need not exist."""
        return LocalFolder(self.path / name)

    def beside(self, name: str) -> LocalFolder | None:
        """Return a folder next to this one; None if there is none."""
        path = self.path.absolute().parent / name
        return LocalFolder(path) if path.is_dir() else None
