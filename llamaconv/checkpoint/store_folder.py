"""A folder of a store: its files as listed, of which ranges are read.

One request lists the folder, further ones many at once get the headers (`OpenableFolder.fetch`).
The version that the listing states of each file must be the same at the end of a conversion.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llamaconv.checkpoint.address import copy_command
from llamaconv.checkpoint.digests import Digest
from llamaconv.checkpoint.folder import Header, read_weights_header
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_errors import as_refusals, explain
from llamaconv.checkpoint.stores import WAITS, State, StoreRanges, filesystem, listing, state_of
from llamaconv.checkpoint.untrusted.files import check_json_size, json_object
from llamaconv.checkpoint.untrusted.safetensors_header import header_end
from llamaconv.report.errors import Problem, RefusedError

# Folders of a checkpoint that have files of it, too.
_INNER = ("original", "additional_chat_templates")
# What most headers of safetensors have; the start and the end of what torch.save writes, where its
# pickle and its directory are; and small files.
_SAFETENSORS_BYTES = 32 * 1024
_PICKLE_BYTES, _DIRECTORY_BYTES = 256 * 1024, 128 * 1024
_JSON_BYTES = 1 << 20


class StoreFolder:
    """An `OpenableFolder` and a `RemoteFolder` in a store.

    Attributes:
        address: The folder.
        path: The same, as a stand-in for a local path.
        files: Bytes of each file, by its path in the folder.
        digests: Nothing: what stores list depends on how a file was sent there.
        has_ranges: Always: others are refused.
        is_one_file: Whether the address is that of a file, which is then listed alone.
    """

    def __init__(
        self,
        address: StoreAddress,
        overlay: Mapping[str, bytes] | None = None,
        listed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """List a folder.

        Args:
            address: The folder.
            overlay: Files, by their names, that are taken to be in the folder and to have this
                content, whatever is there.
            listed: What `listing` returned for the folder; None to ask.

        Raises:
            RefusedError: The store cannot be reached, or has no such folder.
        """
        self.address = address
        self._overlay = dict(overlay or {})
        self._fs, self._fs_path = filesystem(address)
        self._listed = dict(self._list() if listed is None else listed)
        self.files = {
            name: int(info.get("size") or 0)
            for name, info in self._listed.items()
            if info.get("type") == "file"
        }
        whole = [str(info["name"]).strip("/") for info in self._listed.values()]
        self.is_one_file = whole == [self._fs_path.strip("/")]
        self._folders: dict[str, StoreFolder] = {}
        for name in _INNER:
            if name in self._listed and name not in self.files:
                inner = self._folders[name] = StoreFolder(address / name)
                self.files |= {f"{name}/{one}": n for one, n in inner.files.items()}
        self.files |= {name: len(content) for name, content in self._overlay.items()}
        self.digests: dict[str, Digest] = {}
        self.has_ranges = True
        self.ranges = StoreRanges(address, self._fs, self._fs_path, self.files, self._overlay)
        self.path = RemoteFile(str(address), address.name, None, copy_command(address), self.ranges)
        self._starts: dict[str, bytes] = {}
        self._read: dict[str, State] = {}

    def names(self) -> list[str]:
        """Return the names of its files and folders, sorted."""
        return sorted({*self._listed, *self._overlay})

    def is_file(self, name: str) -> bool:
        """Return whether it has a file of this name at its top."""
        return "/" not in name and name in self.files

    def why_no_file(self, name: str) -> str:
        """Return why `is_file` says no, as the rest of a sentence."""
        return "a folder" if name in self._listed else "not found"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON object. Raises `RefusedError` if the file holds anything else."""
        if not self.is_file(name):
            raise RefusedError(f"{self.path / name}: {self.why_no_file(name)}")
        check_json_size(self.path / name, self.files[name])
        self._note(name)
        return json_object(self.path / name, self.ranges.read(name, 0, self.files[name]))

    def read_header(self, name: str) -> Header:
        """Read the header of one file of weights."""
        return read_weights_header(self.path / name, self.open(name))

    def start_of(self, name: str) -> bytes:
        """Return the bytes before the tensors of a safetensors file."""
        if name not in self._starts:
            start = self.ranges.read(name, 0, min(8, self.files[name]))
            end = header_end(start, self.files[name]) or 0
            self._starts[name] = self.ranges.read(name, 0, end)
        return self._starts[name]

    def size_of(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""
        return self.files[name] if self.is_file(name) else None

    @contextmanager
    def open(self, name: str) -> Iterator[StoreBytes]:
        """Open a file; entering it raises ``OSError`` if there is none."""
        if not self.is_file(name):
            raise FileNotFoundError(2, self.why_no_file(name), str(self.path / name))
        self._note(name)
        yield StoreBytes(self.ranges, name)

    def fetch(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Have parts of files at hand, soon to be read.

        Args:
            parts: Name of the file, first byte, and the byte after the last.

        Raises:
            RefusedError: They could not be fetched.
        """
        self.ranges.fetch(parts)

    def fetch_headers(self) -> None:
        """Have the headers of all files of weights and the small files at hand.

        Raises:
            RefusedError: They could not be fetched, or the store sends no ranges.
        """
        self.ranges.check_ranges()
        parts: list[tuple[str, int, int]] = []
        for name, n_bytes in self.files.items():
            if name.endswith(".safetensors"):
                parts.append((name, 0, min(n_bytes, _SAFETENSORS_BYTES)))
            elif name.endswith((".pth", ".pt", ".bin")):
                parts.append((name, 0, min(n_bytes, _PICKLE_BYTES)))
                parts.append((name, max(0, n_bytes - _DIRECTORY_BYTES), n_bytes))
            elif name.endswith(".json") and n_bytes <= _JSON_BYTES and not name.startswith("token"):
                parts.append((name, 0, n_bytes))
        self.fetch(part for part in parts if "/" not in part[0])
        for inner in self._folders.values():
            inner.fetch_headers()

    def forget(self) -> None:
        """Let go of what was fetched, but for the headers."""
        for name in self.files:
            if name.endswith(".safetensors") and name in self._read:
                self.start_of(name)
        self.ranges.forget()
        for inner in self._folders.values():
            inner.forget()

    def subfolder(self, name: str) -> StoreFolder:
        """Return a folder in this one, which need not exist."""
        if name not in self._folders:
            self._folders[name] = StoreFolder(self.address / name, listed={})
        return self._folders[name]

    def inside(self, name: str) -> StoreFolder:
        """Return a folder in this one as a folder of its own. Raises `RefusedError`."""
        return StoreFolder(self.address / name)

    def beside(self, name: str) -> StoreFolder | None:
        """Return a folder next to this one; None if there is none."""
        try:
            return StoreFolder(self.address.parent / name)
        except RefusedError:
            return None

    def version_of(self, name: str) -> State | None:
        """Return what tells a file of weights from another one of its name."""
        if name in self._listed:
            return state_of(self._listed[name])
        found = (inner.version_of(name) for inner in self._folders.values())
        return next((one for one in found if one), None)

    def changed(self) -> list[Problem]:
        """Return a problem for each file that was read and is not what it was when it was listed."""
        now = self._list(WAITS) if self._read else {}
        problems = [
            Problem(
                f"{self.path / name}: {'replaced' if name in now else 'deleted'} since it was "
                "opened; open the source again when nothing writes to it"
            )
            for name, before in self._read.items()
            if name not in now or state_of(now[name]) != before
        ]
        for inner in self._folders.values():
            problems += inner.changed()
        return problems

    def _note(self, name: str) -> None:
        if name not in self._overlay:
            self._read[name] = state_of(self._listed[name])

    def _list(self, waits: Sequence[float] = ()) -> dict[str, dict[str, Any]]:
        for wait in (*waits, None):
            with as_refusals(self.address, self.address):
                try:
                    return listing(self._fs, self._fs_path)
                except Exception as error:
                    if wait is None or not explain(error, self.address).is_transient:
                        raise
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


class StoreBytes:
    """A `llamaconv.checkpoint.untrusted.files.ByteSource` of a file in a store."""

    def __init__(self, ranges: StoreRanges, name: str) -> None:
        """Read the file ``name`` of ``ranges``."""
        self._ranges = ranges
        self._name = name

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self._ranges.size(self._name)

    def read(self, first: int, n_bytes: int) -> bytes:
        """Return bytes from byte ``first`` on; fewer only if the file ends.

        Raises:
            RefusedError: The store does not send them.
        """
        last = min(first + n_bytes, self.n_bytes)
        return self._ranges.read(self._name, first, last) if first < last else b""

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetch spans together that are going to be read."""
        n_bytes = self.n_bytes
        parts = ((self._name, max(0, first), min(last, n_bytes)) for first, last in spans)
        self._ranges.fetch(part for part in parts if part[1] < part[2])
