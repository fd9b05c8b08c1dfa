"""A `Destination` in an object store: files are sent as streams, and nothing is kept on the disk.

A file of weights is one upload, of which the store shows nothing until it is complete. The small
files that say what the checkpoint is (``.metadata``, config.json, params.json, the index, the
receipt) are held in memory until the checks have passed; `uploading` puts them last.
"""

from __future__ import annotations

import base64
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, BinaryIO, cast

from llamaconv.checkpoint.checkpoint import Format
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_errors import as_failures
from llamaconv.checkpoint.store_folder import StoreFolder
from llamaconv.checkpoint.stores import filesystem
from llamaconv.convert.destination import File, Session
from llamaconv.convert.output import CountedBlocks, Output
from llamaconv.ranks import Ranks
from llamaconv.report.errors import FailedError, first_few

LAST: dict[Format, str] = {
    "dcp": ".metadata",
    "meta": "params.json",
    # Not the weights, although there may be one file of them: they are read for the checks before.
    "huggingface": "config.json",
}
"""The file without which no reader of a format takes a folder for a checkpoint."""

# A part is in memory up to three times: collected, copied by the driver, and sent.
_PART_BYTES = 8 << 20
# S3 takes 10,000 parts of a file. What surrounds the tensors of a file is less than the difference.
_MOST_PARTS = 9_000
# What the ranks exchange in one value has an end, 8 MiB.
_VALUE_BYTES = 1 << 20
# Folders of these are nothing but names with a slash, and to make one would make a bucket.
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory", "oss", "oci"}


class Store:
    """A folder of a store that is filled.

    Attributes:
        address: The folder.
        held: What `put` got, by name, in its order.
        sent: Bytes of each file that is complete, as far as this rank knows.
        fs: Its filesystem of fsspec.
        path: The folder in ``fs``.
    """

    can_be_reread = False

    def __init__(self, address: StoreAddress) -> None:
        """Connect. Raises `RefusedError` if there is no driver for the address."""
        self.address = address
        self.held: dict[str, bytes] = {}
        self.sent: dict[str, int] = {}
        self.fs, self.path = filesystem(address)

    @property
    def is_shareable(self) -> bool:
        """Whether several threads may use its driver at once."""
        return bool(self.fs.async_impl) or self.address.scheme == "memory"

    def session(
        self,
        workers: int,  # noqa: ARG002
        stop: threading.Event,
        blocks: CountedBlocks,
        n_bytes: int,  # noqa: ARG002
    ) -> Session:
        """Return what writes the files of weights; see `Destination.session`."""
        return _StoreSession(self, stop, blocks)

    def kept_rows(self, name: str) -> Mapping[int, int]:  # noqa: ARG002
        """Return nothing: an upload that was cut off cannot be read, so none is continued."""
        return {}

    def check_there(self, lengths: Mapping[str, int]) -> None:
        """Raise `FailedError` unless the store lists each file with its length."""
        self.sent |= lengths
        with as_failures(self.address, self.address):
            listed = self.listed()
        wrong = [
            f"{name} ({length:,} bytes sent, {listed.get(name, 0):,} listed)"
            for name, length in lengths.items()
            if listed.get(name) != length
        ]
        if wrong:
            raise FailedError(
                f"{self.address}: the store does not list {first_few(wrong, 3)}; something else "
                "writes there, or ranks write to different stores"
            )

    def to_check(self, ranks: Ranks) -> StoreFolder:
        """Return the folder, with what is held back as if it were there."""
        self._share_held(ranks)
        return StoreFolder(self.address, overlay=self.held)

    def _share_held(self, ranks: Ranks) -> None:
        """Let every rank hold what rank 0 does."""
        if ranks.size == 1:
            return
        held = {name: base64.b64encode(data).decode() for name, data in self.held.items()}
        packed = base64.b64encode(zlib.compress(json.dumps(held).encode())).decode()
        parts = [packed[at : at + _VALUE_BYTES] for at in range(0, len(packed), _VALUE_BYTES)]
        count = ranks.broadcast(len(parts))
        got = [ranks.broadcast(parts[at] if ranks.first else None) for at in range(count)]
        if not ranks.first:
            found = json.loads(zlib.decompress(base64.b64decode("".join(got))))
            self.held = {name: base64.b64decode(data) for name, data in found.items()}

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Send a small file, which is complete after the block. Raises `FailedError`."""
        with Upload(self, name, 0, threading.Event(), _count_nothing) as upload:
            yield cast(BinaryIO, upload)

    def put(self, name: str, content: bytes) -> None:
        """Hold a small file back."""
        self.held[name] = content

    def send(self, name: str, content: bytes) -> None:
        """Send a whole file at once. Raises what the driver raises."""
        self.make_folder(name)
        self.fs.pipe_file(self.path_of(name), content)

    def listed(self) -> dict[str, int]:
        """Return the bytes of each file there, by its path in the folder.

        Raises what the driver raises; a folder that does not exist is an empty one.
        """
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.path, detail=True)
        except FileNotFoundError:
            return {}
        begin = f"{self.path.rstrip('/')}/"
        return {
            path[len(begin) :]: int(info.get("size") or 0)
            for path, info in found.items()
            if path.startswith(begin) and info.get("type") != "directory" and path != begin
        }

    def path_of(self, name: str) -> str:
        """Return the path of a file for the driver."""
        return f"{self.path.rstrip('/')}/{name}"

    def make_folder(self, name: str) -> None:
        """Create the folder of a file, in a store that has folders."""
        if self.address.scheme not in _WITHOUT_FOLDERS:
            self.fs.makedirs(self.path_of(name).rpartition("/")[0], exist_ok=True)


def _count_nothing(_written: int, _reused: int) -> None:
    """Do nothing: no bytes of tensors."""


class Upload(Output):
    """An `Output` to a store.

    Every method but `tell` raises `FailedError` for what a driver raises.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        n_bytes: int,
        stop: threading.Event,
        count: Callable[[int, int], None],
    ) -> None:
        """Begin an upload.

        Args:
            store: Where to.
            name: Name of the file.
            n_bytes: About how long the file becomes, which decides how long its parts are.
            stop: Set once another thread has failed.
            count: Called with the bytes of tensors written, and the bytes reused.
        """
        super().__init__(stop, count)
        self._store = store
        self._name = name
        self._where = store.address / name
        self._part_bytes = part_bytes(n_bytes)
        self._begin = bytearray()
        self._file: Any = None
        self._n_bytes = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._complete()
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self._n_bytes

    def write(self, data: Any) -> int:
        """Add ``data``; once there is enough for a part, it is sent."""
        view = memoryview(data).cast("B")
        with as_failures(self._where, self._store.address):
            if self._file is None:
                self._begin += view
                if len(self._begin) >= self._part_bytes:
                    self._file = self._open()
                    self._file.write(self._begin)
                    self._begin = bytearray()
            else:
                self._file.write(view)
        self._n_bytes += len(view)
        return len(view)

    def _open(self) -> Any:
        """Begin an upload of several parts.

        Without autocommit, as a driver completes what it has, cut off or not, when it lets go of a
        file that is not closed.
        """
        self._store.make_folder(self._name)
        path = self._store.path_of(self._name)
        return self._store.fs.open(path, "wb", block_size=self._part_bytes, autocommit=False)

    def _complete(self) -> None:
        with as_failures(self._where, self._store.address):
            if self._file is None:
                self._store.send(self._name, bytes(self._begin))
            else:
                self._file.close()
                if commit := getattr(self._file, "commit", None):
                    commit()
        self._file = None
        self._store.sent[self._name] = self._n_bytes

    def _discard(self) -> None:
        """Cancel the upload, as well as it goes; `uploading` deletes what may be left of it."""
        if self._file is None:
            return
        with suppress(Exception):
            self._file.discard()
        with suppress(Exception):
            self._file.closed = True  # or its destructor would complete it
        self._file = None


def part_bytes(n_bytes: int) -> int:
    """Return how many bytes a part of a file of about ``n_bytes`` has; whole MiB."""
    return max(_PART_BYTES, -(-n_bytes // _MOST_PARTS + 1) + (1 << 20) - 1 >> 20 << 20)


class _StoreSession:
    n_helpers = 0

    def __init__(self, store: Store, stop: threading.Event, blocks: CountedBlocks) -> None:
        self._store = store
        self._stop = stop
        self._blocks = blocks

    def write(self, file: File) -> tuple[int, Any]:
        count = self._blocks.count
        with Upload(self._store, file.name, file.nbytes, self._stop, count) as upload:
            written = file.write(upload)
        return upload.tell(), written

    def help(self, writing: Sequence[Future[Any]]) -> None:
        pass

    def close(self) -> None:
        pass
