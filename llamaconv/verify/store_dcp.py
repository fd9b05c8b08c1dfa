"""Read rows of a distributed checkpoint in a store by ``dcp.load``, through torch's own reader for it.

As for a local folder, torch gets the metadata after ours has checked it, and our own reader reads
tensors above 2 MiB. The metadata may be one that is not in the store yet.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader
from torch.distributed.checkpoint.metadata import Metadata

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.dcp import open_dcp
from llamaconv.checkpoint.store_folder import StoreFolder
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.untrusted.dcp_metadata import NAME, read_metadata_of
from llamaconv.verify.independent_readers import DcpLoadReader, is_loaded_whole
from llamaconv.verify.torch_metadata import unpickle_content

# A driver reads so much ahead: of S3's it would be 50 MiB for each small tensor.
_AHEAD_BYTES = 256 << 10


class StoreDcpLoadReader(DcpLoadReader):
    """``dcp.load`` with torch's ``FsspecReader``; our own reader for large tensors."""

    def __init__(self, checkpoint: Checkpoint, folder: StoreFolder) -> None:
        """Read ``checkpoint``, which was opened in ``folder``."""
        super().__init__(checkpoint)
        self._folder = folder

    @cached_property
    def _reader(self) -> StoreDcpReader:
        return StoreDcpReader(self._folder)

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        return open_dcp(self._folder).tensors

    def _prefetch(self, names: Sequence[str]) -> None:
        for name in dict.fromkeys(names):
            tensor = self.checkpoint.tensors[name]
            if not is_loaded_whole(tensor):
                self._pieces.expect_rows(tensor, 0, tensor.n_rows)
        self._pieces.start()
        super()._prefetch(names)


class StoreDcpReader(FsspecReader):
    """Torch's reader of one checkpoint in a store, with the metadata that ours has checked."""

    def __init__(self, folder: StoreFolder) -> None:
        """Read the metadata of the checkpoint in ``folder``; raise `RefusedError` if invalid."""
        super().__init__(folder.address.url)
        files: Any = _ShortReads()
        self.path = files.init_path(folder.address.url)
        self.fs = files
        read_metadata_of(folder.path / NAME, folder.open(NAME))
        with folder.open(NAME) as opened:
            self._metadata = unpickle_content(io.BytesIO(opened.read(0, opened.n_bytes)))

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the metadata that was read."""
        return self._metadata


class _ShortReads(FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        files: Any = self.fs
        with files.open(str(path), mode, block_size=_AHEAD_BYTES) as stream:
            yield stream
