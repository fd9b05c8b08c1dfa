"""Files that are not here: what stands in for a local path, and where the bytes come from.

They are in a repository of the Hub (`hub`) or in a store (`store_folder`); who reads them need not
know which.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Protocol


class ByteRanges(Protocol):
    """What has the bytes of files that are elsewhere, each by its name."""

    def size(self, name: str) -> int:
        """Return the bytes of a file."""

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        """Fill ``out`` with the bytes of the file ``name`` from byte ``first`` on.

        Raises:
            FailedError: They could not be fetched, or ``stop`` was set.
        """


@dataclass(frozen=True)
class RemoteFile:
    """A folder that is not here, or a file in it. It stands in for a local path.

    Attributes:
        address: Its address, such as ``hf://ORG/NAME@COMMIT`` or ``s3://BUCKET/PREFIX``, with the
            file's name behind it.
        name: The file's name in the folder; of a folder, its name, short enough for tables.
        commit: Of a repository, the commit in full; else None.
        download: The command that copies the folder here.
        ranges: Where its bytes come from.
    """

    address: str
    name: str
    commit: str | None
    download: str
    ranges: ByteRanges | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    @property
    def size(self) -> int:
        """Bytes of the file."""
        assert self.ranges is not None
        return self.ranges.size(self.name)

    def __truediv__(self, name: str) -> RemoteFile:
        return replace(self, address=f"{self.address}/{name}", name=name)
