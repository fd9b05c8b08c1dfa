"""The engine: turns the moves of a plan into blocks of target bytes, in bounded memory.

A block is a run of rows of a MiB, or whole heads where rows are re-ordered; it is read,
re-ordered, cast and written before the next is read, so memory does not grow with the model.
The writers of the formats ask for blocks, each thread for its own file's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from llamaconv import rope
from llamaconv.assets import assets_folder
from llamaconv.formats import dcp_write, huggingface_write, meta_write
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import DTYPE_BYTES, TensorInfo
from llamaconv.plan import Move, Plan
from llamaconv.problems import Problem, UnusableError
from llamaconv.ranks import ALONE, Progress, Ranks
from llamaconv.scratch import scratch
from llamaconv.threads import one_thread

# A block stays in a core's cache while it is read, hashed and written: 4 MiB took nearly twice the
# time. And a cast holds several copies of it, in each thread.
_BLOCK_BYTES = 1 << 20


class Engine:
    """Turns moves into blocks of target bytes, and counts what passes."""

    def __init__(self, plan: Plan, progress: Progress | None, ranks: Ranks = ALONE) -> None:
        self.plan = plan
        self.params, self.layout = plan.ready()
        self.moves = {move.writes: move for move in plan.written}
        self.progress = progress
        self.ranks = ranks
        self.total = plan.bytes_to_write
        self.bytes_read = self.bytes_written = self.bytes_reused = 0
        self.overflows: dict[str, int] = {}
        self._lock = threading.Lock()
        self.reader = PieceReader()

    def write(self, folder: Path, workers: int) -> dict[str, list[str]]:
        """Writes this rank's share of the target to ``folder``; every tensor's digests.

        Raises `UnusableError` where a value overflows, on whichever rank.
        """
        tensors = [TensorInfo(move.writes, move.dtype, move.shape) for move in self.plan.written]
        # Writers work side by side, so torch's own threads would only take turns with them.
        with self.reader, one_thread():
            digests = self._write_format(folder, tensors, workers)
        self._sum_up()
        return digests

    def _sum_up(self) -> None:
        """What all ranks have counted."""
        mine = [self.bytes_read, self.bytes_written, self.bytes_reused, self.overflows]
        counts = self.ranks.all_gather(mine)
        self.bytes_read, self.bytes_written, self.bytes_reused = (
            sum(one[i] for one in counts) for i in range(3)
        )
        overflows = sum((Counter(found) for *_, found in counts), Counter[str]())
        if overflows:
            raise UnusableError(
                Problem(
                    f"{self.moves[name].source}: {count} finite values become infinite in "
                    f"{self.moves[name].dtype}; keep the dtype, or choose bfloat16",
                    (name,),
                )
                for name, count in overflows.items()
            )

    def _write_format(
        self, folder: Path, tensors: list[TensorInfo], workers: int
    ) -> dict[str, list[str]]:
        target, params = self.plan.target, self.params
        how = self, workers, self.ranks
        if target.to == "dcp":
            return dcp_write.write(folder, tensors, target.shards, *how)
        assets = assets_folder(self.plan.source, target)
        if target.to == "meta":
            if self.ranks.first:
                meta_write.write_params(folder, params, assets)
            return meta_write.write(folder, tensors, target.shards, *how)
        if self.ranks.first:
            dtypes = {tensor.dtype for tensor in tensors}
            huggingface_write.write_assets(folder, params, dtypes, assets)
        return huggingface_write.write(folder, tensors, target.max_shard_size, *how)

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """The target's bytes of rows ``first`` to ``last``, a block at a time.

        A block is valid until the next is asked for: its buffer is used again.
        """
        move = self.moves[name]
        source = self.plan.source.tensors[move.source]
        unit = move.shape[0] // move.heads if move.heads else 1
        step = max(1, _BLOCK_BYTES // (unit * max(1, source.row_bytes))) * unit
        longest = min(step, source.n_rows)
        buffer = scratch(longest * source.row_bytes)
        made = None
        if move.heads or move.dtype != source.dtype:
            elements = longest * source.row_bytes // DTYPE_BYTES[source.dtype]
            made = scratch(elements * DTYPE_BYTES[move.dtype])
        # Rows of a chunk may begin inside a head: whole heads are read, the wanted rows leave.
        for begin in range(first - first % unit, last, step):
            end = min(begin + step, last + -last % unit)
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

    def _transform(
        self, move: Move, source: TensorInfo, block: memoryview, made: memoryview
    ) -> memoryview:
        """A block of source rows as the target's: re-ordered and cast, into ``made``."""
        rows = torch.frombuffer(block, dtype=getattr(torch, source.dtype))
        rows = rows.view(-1, *source.shape[1:])
        if move.heads:
            heads = rows.shape[0] * move.heads // move.shape[0]
            rows = rope.relayout_view(rows, heads, self.layout, self.plan.target.layout)
        dtype = getattr(torch, move.dtype)
        out = made[: rows.numel() * dtype.itemsize]
        # copy_ re-orders and casts in one pass; a view over the bytes needs no numpy to get at them.
        target = torch.frombuffer(out, dtype=dtype).view(rows.shape).copy_(rows)
        # A dtype of a wider range has room for every value.
        if torch.finfo(dtype).max < torch.finfo(rows.dtype).max:
            self._count_overflow(move, rows, target)
        return out

    def _count_overflow(self, move: Move, rows: torch.Tensor, target: torch.Tensor) -> None:
        if count := int((target.isinf() & rows.isfinite()).sum()):
            with self._lock:
                self.overflows[move.writes] = self.overflows.get(move.writes, 0) + count

    def sound(self, name: str) -> bool:
        """Whether nothing of tensor ``name`` has overflowed so far."""
        return name not in self.overflows

    def count(self, n_written: int, n_reused: int = 0) -> None:
        """So many bytes of the target were written, or by a run before this one."""
        with self._lock:
            self.bytes_written += n_written
            self.bytes_reused += n_reused
            done = self.bytes_written + self.bytes_reused
        if self.progress:
            self.progress("write", done, self.total)


def target_rows(plan: Plan, name: str, first: int, last: int) -> Iterator[bytes]:
    """The bytes that a conversion would write for rows ``first`` to ``last`` of ``name``.

    ``name`` is a target's; the last row is excluded. Reads these rows, or the heads that they
    are of, and writes nothing. Raises `FailedError` where the source ends early.
    """
    engine = Engine(plan, None)
    with engine.reader:
        yield from map(bytes, engine.blocks(name, first, last))
