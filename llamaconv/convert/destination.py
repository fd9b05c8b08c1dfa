"""Where the files of an unfinished target go: `disk` has a local folder, `store` an object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llamaconv.checkpoint.store_folder import StoreFolder
from llamaconv.convert.output import CountedBlocks, Output, Payload
from llamaconv.ranks import Ranks


@dataclass(frozen=True)
class File:
    """One file of weights. One thread writes it: Linux does one write to a file at a time.

    Attributes:
        name: Its name in the target.
        payloads: The rows that it holds, in order.
        write: Writes it, and returns a JSON value.
    """

    name: str
    payloads: Sequence[Payload]
    write: Callable[[Output], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.n_rows * one.bytes_per_row for one in self.payloads)


class Session(Protocol):
    """Writes files of weights, in several threads of one rank.

    Attributes:
        n_helpers: How many threads call `help`.
    """

    n_helpers: int

    def write(self, file: File) -> tuple[int, Any]:
        """Write a file; return its bytes, and what its ``write`` returned. Raises ``OSError``."""

    def help(self, writing: Sequence[Future[Any]]) -> None:
        """Do in the background what is left to do for the files, until all ``writing`` is done."""

    def close(self) -> None:
        """Let go of what an error left open, once no thread writes or helps any more."""


class Destination(Protocol):
    """An unfinished target.

    Attributes:
        can_be_reread: Whether rows can be read again as soon as they are written.
    """

    can_be_reread: bool

    def session(
        self, workers: int, stop: threading.Event, blocks: CountedBlocks, n_bytes: int
    ) -> Session:
        """Return what writes the files of weights.

        Args:
            workers: Threads of this rank that write at once.
            stop: Set once a thread has failed.
            blocks: Told what is written.
            n_bytes: Bytes of all files of weights, of all ranks.
        """

    def kept_rows(self, name: str) -> Mapping[int, int]:
        """Return how many rows of each payload of a file an earlier run left, by its number."""

    def check_there(self, lengths: Mapping[str, int]) -> None:
        """Raise `FailedError` unless each file, whichever rank wrote it, has its length here."""

    def to_check(self, ranks: Ranks) -> Path | StoreFolder:
        """Return what all ranks read back to check it, once everything is written."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a small file that is copied as it is; it is complete after the block."""

    def put(self, name: str, content: bytes) -> None:
        """Write a small file that says what the checkpoint is. Raises ``OSError``."""
