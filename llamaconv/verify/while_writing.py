"""Compare tensors as soon as they are written, while both sides are still in the page cache.

Read again from the disk, both sides of a long model took as long as its conversion. A result is
that of a place: `still_there` gives only those of tensors that the finished target, opened anew,
has at exactly the bytes that were compared. All others are compared again, after the writing.

Limit: what is compared is what the system holds of the files. That it also reached the disk is
what the fsync of every file says, and what `llamaconv verify` finds out at any later time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.torch_rows import one_thread
from llamaconv.model.names import whole
from llamaconv.plan.plan import Move, Plan
from llamaconv.report.errors import STOPPED, FailedError
from llamaconv.verify.bits_and_scores import Comparison, Findings, units
from llamaconv.verify.independent_readers import READERS, reader_for

# Writers wait while so much is not compared yet, or it would leave memory before it is.
_MOST_WAITING_BYTES = 1 << 30
# What was compared so long ago has reached the disk, and leaves memory.
_KEPT_BYTES = 512 << 20


class WhileWriting:
    """The comparisons that run beside the writers of a target. A context manager of its threads."""

    def __init__(self, plan: Plan, folder: Path, n_threads: int, forget: bool) -> None:
        """Prepare to compare what ``plan`` says.

        Args:
            plan: A plan without errors.
            folder: Where the target is written.
            n_threads: Threads that compare.
            forget: Whether what was compared is to leave the page cache.
        """
        params, _ = plan.ready()
        self._forget = forget
        self._places: dict[str, TensorInfo] = {}
        target = Checkpoint(
            path=folder,
            format=plan.target.format,
            tensors=self._places,
            naming=plan.target.naming,
            rope=plan.target.layout,
            params=params,
        )
        self._comparisons = [
            Comparison(plan, reader_for(plan.source), READERS[target.format](target))
            for _ in range(n_threads)
        ]
        # q and k of a layer are compared together.
        self._units = [unit for unit in units(plan) if all(map(self._can_compare, unit))]
        self._unit_of = {move.target_name: unit for unit in self._units for move in unit}
        self._pieces: dict[str, list[Callable[[], Piece]]] = {}
        self._written: dict[str, int] = {}
        self._ready: deque[list[Move]] = deque()
        self._waiting_bytes = 0
        self._compared: deque[tuple[Path, int, int]] = deque()
        self._changed = threading.Condition()
        self._stop = self._end = False
        self._pool = ThreadPoolExecutor(n_threads)
        self._jobs: list[Future[None]] = []

    def _can_compare(self, move: Move) -> bool:
        info = TensorInfo(move.target_name, move.dtype, move.shape)
        is_part = whole(info.name) != info.name
        return (
            bool(info.nbytes) and not is_part and not self._comparisons[0].target.needs_index(info)
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors that can be compared before the target is complete."""
        return sum(move.nbytes for unit in self._units for move in unit)

    def __enter__(self) -> WhileWriting:
        self._one_thread = one_thread()
        self._one_thread.__enter__()
        self._jobs = [self._pool.submit(self._work, one) for one in self._comparisons]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._pool.shutdown()
        self._one_thread.__exit__(kind, error, trace)
        for comparison in self._comparisons:
            comparison.source.close()
            comparison.target.close()

    def wrote(self, name: str, n_bytes: int, piece: Callable[[], Piece]) -> None:
        """Note that some bytes of a tensor can be read from the target now. Call it from any thread.

        It returns when few bytes wait to be compared.

        Args:
            name: Name of the target tensor.
            n_bytes: How many of its bytes.
            piece: Opens its file, and returns where they are.
        """
        with self._changed:
            if self._stop or (unit := self._unit_of.get(name)) is None:
                return
            self._pieces.setdefault(name, []).append(piece)
            self._written[name] = self._written.get(name, 0) + n_bytes
            if all(self._written.get(move.target_name, 0) == move.nbytes for move in unit):
                self._ready.append(unit)
                self._waiting_bytes += sum(move.nbytes for move in unit)
                self._changed.notify_all()
            while self._waiting_bytes > _MOST_WAITING_BYTES and not self._stop:
                self._changed.wait()

    def stop(self) -> None:
        """Compare nothing more. Call it from any thread."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def finish(self) -> None:
        """Compare what is left, once everything is written and fsynced."""
        with self._changed:
            self._end = True
            self._changed.notify_all()
        for job in self._jobs:
            job.result()
        self._leave_memory(0)

    def still_there(self, target: Checkpoint) -> Findings:
        """Return what was found of the tensors that ``target`` has where they were compared."""
        found = [comparison.findings for comparison in self._comparisons]
        tensors = [
            tensor
            for one in found
            for tensor in one.tensors
            if target.tensors.get(tensor.name) == self._places[tensor.name]
        ]
        return Findings(tensors, [score for one in found for score in one.scores])

    def _work(self, comparison: Comparison) -> None:
        try:
            while unit := self._next():
                for move in unit:
                    pieces = sorted(
                        (piece() for piece in self._pieces.pop(move.target_name)),
                        key=lambda piece: piece.start,
                    )
                    name = move.target_name
                    self._places[name] = TensorInfo(name, move.dtype, move.shape, tuple(pieces))
                comparison.compare(unit, self._go_on)
                with self._changed:
                    self._waiting_bytes -= sum(move.nbytes for move in unit)
                    self._changed.notify_all()
                    for move in unit:
                        self._note(self._places[move.target_name])
                self._leave_memory(_KEPT_BYTES)
        except Exception:
            # The checks after the writing read it again, and say why that fails.
            self.stop()

    def _next(self) -> list[Move] | None:
        with self._changed:
            while not self._ready and not self._end and not self._stop:
                self._changed.wait()
            return self._ready.popleft() if self._ready and not self._stop else None

    def _go_on(self, _n_bytes: int) -> None:
        if self._stop:
            raise FailedError(STOPPED)

    def _note(self, tensor: TensorInfo) -> None:
        per_piece = tensor.nbytes // len(tensor.pieces)
        self._compared += [(piece.local_file, piece.offset, per_piece) for piece in tensor.pieces]

    def _leave_memory(self, kept: int) -> None:
        """Let the system use the memory of what was compared, but for the last ``kept`` bytes."""
        if not self._forget or not hasattr(os, "posix_fadvise"):
            return
        with self._changed:
            n_bytes = sum(one[2] for one in self._compared) - kept
            old = []
            while self._compared and n_bytes > 0:
                old.append(self._compared.popleft())
                n_bytes -= old[-1][2]
        for path, offset, length in old:
            with suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
