"""One file of weights: the bytes of tensors, and the bytes around them.

`disk_file` writes it to a disk, `upload` to an object store.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import xxhash

from llamaconv.checkpoint.buffers import ReusableBuffer
from llamaconv.checkpoint.tensors import Piece
from llamaconv.report.errors import STOPPED, FailedError


@dataclass(frozen=True)
class Written:
    """Whole rows of a tensor in a file of the target, from byte ``offset`` on."""

    name: str
    first: int
    last: int
    row_bytes: int
    path: Path
    offset: int
    digest: str


class Blocks(Protocol):
    """Where the bytes of the target come from."""

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """Yield rows ``first`` to ``last`` (excluded) of tensor ``name``, in order.

        A block is valid until the next is asked for, which reuses its memory.
        """

    def expect(self, name: str, first: int, last: int, kept: int) -> None:
        """Prepare for rows ``first`` to ``last`` of a file, of which ``kept`` are already there.

        `blocks` is called for the others, after those that were expected before.
        """

    def is_needed_again(self, name: str) -> bool:  # noqa: ARG002
        """Return whether `wrote` is to be told where the rows of a tensor are."""
        return False

    def wrote(self, written: Written) -> None:
        """Note rows that can be read from the target now."""

    def is_valid(self, name: str) -> bool:
        """Return whether no value of ``name`` has overflowed so far."""


class CountedBlocks(Blocks, Protocol):
    """`Blocks` of a whole target, and what is told about the files that they went to.

    Attributes:
        are_read_back: Whether what is written is read again at once, from the page cache.
    """

    are_read_back: bool

    def start(self) -> None:
        """Begin to fetch what is expected, if it is on another machine."""

    def stop(self) -> None:
        """Let every thread that waits for bytes of another machine end soon."""

    def count(self, n_written: int, n_reused: int = 0) -> None:
        """Add bytes of tensors that were written, and bytes that were already in their file."""

    def note_refusal(self) -> None:
        """Note that the filesystem refused to be written around the page cache."""

    def can_be_read(self, name: str, n_bytes: int, piece: Callable[[], Piece]) -> None:
        """Note that some bytes of a tensor are in their file; see `WhileWriting.wrote`."""


@dataclass(frozen=True)
class Payload:
    """Rows of a tensor as one file holds them.

    Attributes:
        blocks: Where the bytes come from.
        name: The tensor.
        first: Its first row in the file.
        last: The row after its last.
        row_bytes: Bytes of one row of the tensor.
        columns: The bytes of each row that the file holds, half-open; None for whole rows.
    """

    blocks: Blocks
    name: str
    first: int
    last: int
    row_bytes: int
    columns: tuple[int, int] | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows in the file."""
        return self.last - self.first

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row in the file."""
        left, right = self.columns or (0, self.row_bytes)
        return right - left

    @property
    def is_valid(self) -> bool:
        """Whether no value of the tensor has overflowed so far."""
        return self.blocks.is_valid(self.name)

    def expect(self, row: int) -> None:
        """Prepare for `read` from row ``row`` on."""
        self.blocks.expect(self.name, self.first, self.last, row)

    def read(self, row: int) -> Iterator[memoryview]:
        """Yield the bytes from row ``row`` of the payload to its end; see `Blocks.blocks`."""
        blocks = self.blocks.blocks(self.name, self.first + row, self.last)
        return blocks if self.columns is None else self._cut(blocks, *self.columns)

    def _cut(self, blocks: Iterator[memoryview], left: int, right: int) -> Iterator[memoryview]:
        buffer = ReusableBuffer()
        for block in blocks:
            rows = torch.frombuffer(block, dtype=torch.uint8).view(-1, self.row_bytes)
            cut = rows[:, left:right]
            out = buffer.take(cut.numel())
            torch.frombuffer(out, dtype=torch.uint8).view(cut.shape).copy_(cut)
            yield out


class Output(ABC):
    """A file that is written from start to end. A context manager.

    After the block the file is complete; after an error in it, it is not. Every method raises
    ``OSError``, and `FailedError` once ``stop`` is set.

    Attributes:
        readable: Where others can read what is written so far; None if they cannot.
    """

    readable: Path | None = None

    def __init__(self, stop: threading.Event, count: Callable[[int, int], None]) -> None:
        """Begin a file.

        Args:
            stop: Set once another thread has failed.
            count: Called with the bytes of tensors written, and the bytes reused.
        """
        self._stop = stop
        self._count = count

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def reserve(self, n_bytes: int) -> None:  # noqa: B027
        """Give the file its final length, so that readers take it while it is written."""

    @abstractmethod
    def tell(self) -> int:
        """Return the position in the file, in bytes."""

    @abstractmethod
    def write(self, data: Any) -> int:
        """Write all of ``data``; return its bytes."""

    def stream(self, payload: Payload) -> tuple[int, str]:
        """Write what is missing of a payload; return its bytes and their xxh3-128 digest."""
        begin = self.tell()
        rows, digest = self._reuse(payload)
        n_bytes = rows * payload.bytes_per_row
        for block in payload.read(rows):
            if self._stop.is_set():
                raise FailedError(STOPPED)
            digest.update(block)
            self.write(block)
            self._count(len(block), 0)
            n_bytes += len(block)
            self._after_block(payload, len(block), n_bytes, digest)
        self._after_payload(payload, begin, n_bytes, digest)
        return n_bytes, digest.hexdigest()

    def _reuse(self, payload: Payload) -> tuple[int, xxhash.xxh3_128]:  # noqa: ARG002
        """Return how many rows of ``payload`` are already in the file, and their digest."""
        return 0, xxhash.xxh3_128()

    def _after_block(  # noqa: B027
        self, payload: Payload, new: int, n_bytes: int, digest: xxhash.xxh3_128
    ) -> None:
        """Note ``new`` bytes, of ``n_bytes`` of the payload so far."""

    def _after_payload(  # noqa: B027
        self, payload: Payload, begin: int, n_bytes: int, digest: xxhash.xxh3_128
    ) -> None:
        """Note a payload that is written, from byte ``begin`` of the file on."""
