"""The engine: turn the moves of a plan into blocks of target bytes, in bounded memory.

A block is about one MiB of rows, or whole heads if rows are reordered. It is read, reordered, cast
and written before the next is read, so memory does not grow with the model. The writers of the
formats ask for blocks, each thread for those of its own file.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from llamaconv.checkpoint.buffers import scratch
from llamaconv.checkpoint.fetch_ahead import Fetched
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.checkpoint.torch_rows import one_thread
from llamaconv.convert.destination import Destination
from llamaconv.convert.output import Written
from llamaconv.convert.target_files import write_target
from llamaconv.model import rope
from llamaconv.plan.plan import Move, Plan
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import FailedError, Problem, UnusableError
from llamaconv.report.progress import Progress, no_progress
from llamaconv.verify.while_writing import WhileWriting

# A block stays in a core's cache while it is read, hashed and written: 4 MiB took nearly twice the
# time. And a cast holds several copies of it, in each thread.
_BLOCK_BYTES = 1 << 20
_RANGES_AT_ONCE = 10_000


class Engine:
    """Turn moves into blocks of target bytes, and count them.

    Attributes:
        bytes_read: Bytes read from the source; of all ranks after `write`, like the next two.
        bytes_written: Bytes of tensors written.
        bytes_reused: Bytes of tensors that an earlier run had written.
        fetched: The ranges that all ranks have fetched from a source that lists no digests.
        overflows: Number of values that became infinite, by target tensor.
        was_refused: Whether the filesystem refused to be written around the page cache.
        are_read_back: Whether what is written is compared at once.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        ranks: Ranks = ALONE,
        checks: WhileWriting | None = None,
    ) -> None:
        """Prepare the conversion of ``plan``, which must have no errors.

        Args:
            plan: What to write.
            progress: Called with "write", the bytes written so far, and all bytes.
            ranks: The processes that share the work.
            checks: What compares while this writes.
        """
        self._checks = checks
        self.are_read_back = checks is not None
        self.plan = plan
        self.params, self.layout = plan.ready()
        self.moves = {move.target_name: move for move in plan.stored}
        self.progress = progress
        self.ranks = ranks
        self.total = plan.bytes_to_write
        self.bytes_read = self.bytes_written = self.bytes_reused = 0
        self.overflows: dict[str, int] = {}
        self.was_refused = False
        self._lock = threading.Lock()
        remote = plan.source.remote
        # A repository of the Hub lists digests; what a store sends is known by what came.
        self.reader = PieceReader(digests=remote is not None and not remote.digests)
        self.fetched: list[Fetched] = []
        # A tied head is its embedding: from another machine, that is fetched once, and then read
        # from where it was written.
        counts = Counter(move.source for move in plan.written if plan.source.remote)
        self._repeated = {name for name, count in counts.items() if count > 1}
        self._expected: set[tuple[str, int, int]] = set()
        self._written: dict[tuple[str, int, int], Written] = {}

    def write(self, target: Destination, workers: int) -> dict[str, list[str]]:
        """Write this rank's share of the target.

        Args:
            target: The target to fill.
            workers: Writer threads of this rank.

        Returns:
            The xxh3-128 digests of every tensor's pieces, of all ranks.

        Raises:
            UnusableError: A value overflowed, on any rank.
        """
        # Writers run in parallel, so torch's own threads would only compete with them.
        if not target.can_be_reread:
            self._repeated.clear()
        with self.reader, one_thread():
            digests = write_target(target, self.plan, self, workers, self.ranks)
        self._sum_up()
        return digests

    def _sum_up(self) -> None:
        """Add up what all ranks have counted."""
        mine = [self.bytes_read, self.bytes_written, self.bytes_reused, self.was_refused]
        counts = self.ranks.all_gather([*mine, self.overflows])
        self.fetched = self._fetched_by_all()
        self.bytes_read, self.bytes_written, self.bytes_reused, refusals = (
            sum(one[i] for one in counts) for i in range(4)
        )
        self.was_refused = bool(refusals)
        overflows = sum((Counter(found) for *_, found in counts), Counter[str]())
        if overflows:
            raise UnusableError(
                Problem(
                    f"{self.moves[name].source}: {count} finite values become infinite in "
                    f"{self.moves[name].dtype}. Keep the dtype, or choose bfloat16",
                    (name,),
                )
                for name, count in overflows.items()
            )

    def _fetched_by_all(self) -> list[Fetched]:
        """Return the ranges of all ranks; what they exchange at once has an end, 8 MiB."""
        mine = self.reader.fetched
        n_parts = max(self.ranks.all_gather(-(-len(mine) // _RANGES_AT_ONCE)))
        parts = (
            self.ranks.all_gather(mine[at * _RANGES_AT_ONCE : (at + 1) * _RANGES_AT_ONCE])
            for at in range(n_parts)
        )
        return [(*one,) for part in parts for some in part for one in some]

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """Yield rows ``first`` to ``last`` (excluded) of a target tensor, block by block.

        A block is valid until the next is asked for, which reuses its memory.
        """
        move = self.moves[name]
        source = self.plan.source.tensors[move.source]
        if written := self._already(move.source, first, last):
            yield from _read_again(written, first, last)
            return
        windows = self._windows(name, first, last)
        longest = max((end - begin for begin, end in windows), default=0)
        buffer = scratch(longest * source.row_bytes)
        made = None
        if move.heads or move.dtype != source.dtype:
            elements = longest * source.row_bytes // DTYPE_BYTES[source.dtype]
            made = scratch(elements * DTYPE_BYTES[move.dtype])
        # Rows of a chunk may begin inside a head: read whole heads, and yield the expected rows.
        for begin, end in windows:
            block = buffer[: (end - begin) * source.row_bytes]
            self.reader.read_rows(source, begin, end, block)
            out = block if made is None else self._transform(move, source, block, made)
            row_bytes = len(out) // (end - begin)
            out = out[
                (max(first, begin) - begin) * row_bytes : (min(last, end) - begin) * row_bytes
            ]
            with self._lock:
                self.bytes_read += len(block)
            yield out

    def _windows(self, name: str, first: int, last: int) -> list[tuple[int, int]]:
        """Return the source rows of each block; whole heads if rows are reordered."""
        move = self.moves[name]
        unit = move.shape[0] // move.heads if move.heads else 1
        source = self.plan.source.tensors[move.source]
        return list(source.windows(_BLOCK_BYTES, unit, first, last))

    def expect(self, name: str, first: int, last: int, kept: int) -> None:
        """Prepare for rows ``first`` to ``last`` of a file, of which ``kept`` are already there."""
        if self.plan.source.remote is None:
            return  # the system reads files ahead
        move = self.moves[name]
        if move.source in self._repeated:
            if (move.source, first, last) in self._expected:
                return
            self._expected.add((move.source, first, last))
        source = self.plan.source.tensors[move.source]
        for begin, end in self._windows(name, first + kept, last):
            self.reader.expect_rows(source, begin, end)

    def is_needed_again(self, name: str) -> bool:
        """Return whether another tensor has the same source, which is on another machine."""
        return self.moves[name].source in self._repeated

    def wrote(self, written: Written) -> None:
        """Note rows that can be read from the target now.

        Raises:
            UnusableError: The rows were written before, and read back as others.
        """
        move = self.moves[written.name]
        before = self._written.setdefault((move.source, written.first, written.last), written)
        if before.digest != written.digest:
            raise UnusableError(
                f"{before.path}: {before.name} does not read back as it was written. Check the disk"
            )

    def _already(self, source: str, first: int, last: int) -> Written | None:
        """Return where rows of a source tensor are in the target; they are never reordered."""
        if source not in self._repeated:
            return None
        there = (one for (name, *_), one in self._written.items() if name == source)
        return next((one for one in there if one.first <= first and last <= one.last), None)

    def start(self) -> None:
        """Begin to fetch what is expected, if the source is on another machine."""
        self.reader.start()

    def stop(self) -> None:
        """Let every thread that waits end soon."""
        self.reader.stop()
        if self._checks is not None:
            self._checks.stop()

    def can_be_read(self, name: str, n_bytes: int, piece: Callable[[], Piece]) -> None:
        """Let what is in its file be compared."""
        if self._checks is not None:
            self._checks.wrote(name, n_bytes, piece)

    def _transform(
        self, move: Move, source: TensorInfo, block: memoryview, made: memoryview
    ) -> memoryview:
        """Reorder and cast a block of source rows into ``made``; return the part that is filled."""
        rows = torch.frombuffer(block, dtype=getattr(torch, source.dtype))
        rows = rows.view(-1, *source.shape[1:])
        if move.heads:
            heads = rows.shape[0] * move.heads // move.shape[0]
            rows = rope.relayout_view(rows, heads, self.layout, self.plan.target.layout)
        dtype = getattr(torch, move.dtype)
        out = made[: rows.numel() * dtype.itemsize]
        # copy_ reorders and casts in one pass; a view of the bytes needs no numpy.
        target = torch.frombuffer(out, dtype=dtype).view(rows.shape).copy_(rows)
        # A dtype of a wider range has room for every value.
        if torch.finfo(dtype).max < torch.finfo(rows.dtype).max:
            self._count_overflow(move, rows, target)
        return out

    def _count_overflow(self, move: Move, rows: torch.Tensor, target: torch.Tensor) -> None:
        if count := int((target.isinf() & rows.isfinite()).sum()):
            with self._lock:
                self.overflows[move.target_name] = self.overflows.get(move.target_name, 0) + count

    def is_valid(self, name: str) -> bool:
        """Return whether no value of ``name`` has overflowed so far."""
        return name not in self.overflows

    def count(self, n_written: int, n_reused: int = 0) -> None:
        """Add bytes that were written, and bytes that an earlier run had written."""
        with self._lock:
            self.bytes_written += n_written
            self.bytes_reused += n_reused
            done = self.bytes_written + self.bytes_reused
        self.progress("write", done, self.total)

    def note_refusal(self) -> None:
        """Note that the filesystem refused to be written around the page cache."""
        self.was_refused = True


def _read_again(written: Written, first: int, last: int) -> Iterator[memoryview]:
    """Yield rows that are in the target, block by block, as `Engine.blocks` does."""
    with written.path.open("rb", buffering=0) as file:
        file.seek(written.offset + (first - written.first) * written.row_bytes)
        left = (last - first) * written.row_bytes
        buffer = scratch(min(_BLOCK_BYTES, left))
        while left:
            got = file.readinto(buffer[:left])
            if not got:
                raise FailedError(f"{written.path}: ends early; something else has changed it")
            left -= got
            yield buffer[:got]


def target_rows(plan: Plan, name: str, first: int, last: int) -> Iterator[bytes]:
    """Yield the bytes that a conversion would write for some rows, and write nothing.

    Args:
        plan: A plan without errors.
        name: Name of the target tensor.
        first: The first row.
        last: The row after the last.

    Raises:
        FailedError: A file of the source ends early.
    """
    engine = Engine(plan, no_progress)
    with engine.reader:
        yield from map(bytes, engine.blocks(name, first, last))
