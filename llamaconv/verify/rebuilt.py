"""Check a target against the digests that a repository lists, without fetching it again.

Each file of the repository is rebuilt from the target, byte by byte: its header as it was received,
then its tensors, with the rows of q and k brought back by index arithmetic that shares no code with
the engine. If the digest of that is the one listed, the target has every bit of the file, in the
right order of rows.

Limit: the target must have all bytes of the file. A cast, or a tensor that is left out, hides them;
`Rebuilt.unknown` has these files.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llamaconv.checkpoint.buffers import scratch
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.digests import difference, hasher
from llamaconv.checkpoint.tensors import DTYPE_BYTES
from llamaconv.checkpoint.torch_rows import TensorBuffer
from llamaconv.checkpoint.weight_values import OddValues, count_not_finite
from llamaconv.plan.plan import Move, Plan
from llamaconv.report.errors import first_few
from llamaconv.report.progress import Progress
from llamaconv.verify.bits_and_scores import (
    WINDOW_BYTES,
    count_different,
    rows_in_other_layout,
    too_odd,
)
from llamaconv.verify.independent_readers import IndependentReader, reader_for
from llamaconv.verify.results import Check

T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    """Bytes ``first`` to ``last`` of a file, and which rows of which move's target they are."""

    first: int
    last: int
    move: Move
    rows: tuple[int, int]


@dataclass
class _Outcome:
    """What one rebuilt file is: why its digest is another, and whether wrong rows would show."""

    why: str
    shows_wrong_rows: bool
    odd: list[OddValues]


class Rebuilt:
    """The files of a plan's repository, as its target gives them back.

    Attributes:
        files: Names of the files that can be rebuilt.
        unknown: Why each other file of weights cannot, by name.
    """

    def __init__(self, plan: Plan) -> None:
        """Find out which files the target of ``plan`` has whole."""
        repository = plan.source.remote
        assert repository is not None
        self.plan = plan
        self.remote = repository
        parts: dict[str, dict[int, _Part]] = defaultdict(dict)
        # A tied head and its embedding are the same bytes of the file.
        self._copies: list[tuple[Move, Move]] = []
        for move in plan.written:
            tensor = plan.source.tensors[move.source]
            if tensor.dtype != move.dtype:
                continue
            for piece in tensor.pieces:
                top, n_rows = (piece.start[0], piece.shape[0]) if piece.shape else (0, 1)
                if piece.shape[1:] != tensor.shape[1:] or piece.strides:
                    continue
                n_bytes = n_rows * tensor.row_bytes
                part = _Part(piece.offset, piece.offset + n_bytes, move, (top, top + n_rows))
                other = parts[piece.file.name].setdefault(piece.offset, part)
                if other.move is not move and (other.move, move) not in self._copies:
                    self._copies.append((other.move, move))
        self._parts: dict[str, list[_Part]] = {}
        self.unknown: dict[str, str] = {}
        for name in plan.source.file_bytes:
            its = [part for _, part in sorted(parts[name].items()) if part.first < part.last]
            if name not in repository.digests:
                self.unknown[name] = "the repository lists no digest of it"
            elif not self._is_whole(name, its):
                self.unknown[name] = "the target does not have all of its bytes"
            else:
                self._parts[name] = its

    @property
    def files(self) -> list[str]:
        """Names of the files that can be rebuilt."""
        return [*self._parts]

    @property
    def remark(self) -> str:
        """What was not compared with the repository, and how to; for the end of a detail."""
        if not self.unknown:
            return ""
        reasons = sorted(set(self.unknown.values()))
        return (
            f"; not compared with the repository: {first_few(self.unknown, 3)} "
            f"({'; '.join(reasons)}). 'llamaconv verify SRC DST' fetches it again and does"
        )

    def _is_whole(self, name: str, parts: list[_Part]) -> bool:
        at = len(self.remote.start_of(name))
        for part in parts:
            if part.first != at:
                return False
            at = part.last
        return at == self.remote.files[name]

    def check(self, target: Checkpoint, progress: Progress, n_threads: int = 1) -> Check:
        """Rebuild each file and compare its digest.

        Args:
            target: The opened target, with its parameters.
            progress: Called with "verify", the bytes done, and the bytes of all these files.
            n_threads: How many files to rebuild at a time.

        Returns:
            The check, whose value counts files with another digest. The control counts those that
            would have another if the rows of q and k had kept their order.
        """
        total = sum(self.remote.files[name] for name in self.files)
        outcomes = rebuild_files(
            self.plan, target, self.files, self._rebuild, total, progress, n_threads
        )
        wrong = {name: one.why for name, one in outcomes.items() if one.why}
        untied = untied_copies(self.plan, target, self._copies)
        odd = too_odd([one for outcome in outcomes.values() for one in outcome.odd])
        control = sum(bool(one.why) or one.shows_wrong_rows for one in outcomes.values())
        detail = (
            f"{len(outcomes)} files of {self.remote.path.name}, rebuilt from the target, have "
            "the digests that it lists; nothing was fetched again"
        )
        if untied:
            detail = f"{untied[0]}: not the same as what it is tied to"
        elif wrong:
            shown = (f"{name}: {why}" for name, why in wrong.items())
            detail = (
                f"{len(wrong)} files differ when rebuilt from the target: {first_few(shown, 3)}"
            )
        elif odd:
            detail += f", but {odd}"
        value = float(len(wrong) + len(untied))
        return Check("repository", not value and not odd, value, float(control), detail)

    def _rebuild(self, name: str, reader: RebuiltReader, count: Callable[[int], None]) -> _Outcome:
        listed = self.remote.digests[name]
        digest = hasher(listed, self.remote.files[name])
        start = self.remote.start_of(name)
        digest.update(start)
        count(len(start))
        shows, odd = False, []
        memory = scratch(0)
        for part in self._parts[name]:
            move = part.move
            reader.prefetch([move.source])
            row_bytes = (part.last - part.first) // (part.rows[1] - part.rows[0])
            unit = move.shape[0] // move.heads if move.heads else 1
            step = max(1, WINDOW_BYTES // (unit * row_bytes)) * unit
            nan = infinite = 0
            for first in range(*part.rows, step):
                last = min(first + step, part.rows[1])
                rows = reader.rows(move.source, first, last)
                shows = shows or reader.shows_wrong_rows(move, rows)
                found = count_not_finite(rows)
                nan, infinite = nan + found[0], infinite + found[1]
                n_bytes = rows.numel() * DTYPE_BYTES[move.dtype]
                if len(memory) < n_bytes:
                    memory = scratch(n_bytes)
                torch.frombuffer(memory, dtype=rows.dtype)[: rows.numel()].copy_(rows.reshape(-1))
                digest.update(memory[:n_bytes])
                count(n_bytes)
            if nan or infinite:
                odd.append(OddValues(move.target_name, nan, infinite))
        why = difference(listed, digest.hexdigest(), self.remote.path)
        return _Outcome(why, shows, odd)


def rebuild_files(
    plan: Plan,
    target: Checkpoint,
    names: Sequence[str],
    rebuild: Callable[[str, RebuiltReader, Callable[[int], None]], T],
    total: int,
    progress: Progress,
    n_threads: int,
) -> dict[str, T]:
    """Rebuild files of the source, some at a time.

    Args:
        plan: The conversion.
        target: The opened target.
        names: The files.
        rebuild: Rebuilds one, with a reader of its thread, and calls the function with the bytes
            that are done.
        total: Bytes of all files.
        progress: Called with "verify", the bytes done, and ``total``.
        n_threads: How many files at a time.

    Returns:
        What ``rebuild`` returned, by file.
    """
    lock, done = threading.Lock(), 0

    def count(n_bytes: int) -> None:
        nonlocal done
        with lock:
            done += n_bytes
            now = done
        progress("verify", now, total)

    def work(name: str) -> T:
        with closing(RebuiltReader(target, plan)) as reader:
            return rebuild(name, reader, count)

    with ThreadPoolExecutor(n_threads) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def untied_copies(plan: Plan, target: Checkpoint, copies: Sequence[tuple[Move, Move]]) -> list[str]:
    """Return the tensors of the target that differ from those that they are tied to."""
    with closing(RebuiltReader(target, plan)) as reader:
        return [copy.target_name for one, copy in copies if not reader.are_equal(one, copy)]


class RebuiltReader(IndependentReader):
    """The rows of a source as its target gives them back, by the names of the source."""

    reader = "the reader of the target"

    def __init__(self, target: Checkpoint, plan: Plan) -> None:
        """Read ``target``, the result of ``plan``."""
        super().__init__(target)
        self._target = reader_for(target)
        self._moves = {move.source: move for move in reversed(plan.written)}
        self._params, _ = plan.ready()
        self._layout = plan.target.layout
        self._ordered = TensorBuffer()
        self._stored = torch.empty(0)

    @property
    def concession(self) -> str:
        """What our own reader reads instead."""
        return self._target.concession

    def close(self) -> None:
        """Close files that are still open."""
        super().close()
        self._target.close()

    def are_equal(self, one: Move, other: Move) -> bool:
        """Return whether two tensors of the target, which are not reordered, have the same bits."""
        row_bytes = one.nbytes // one.shape[0]
        step = max(1, WINDOW_BYTES // row_bytes)
        with closing(reader_for(self.checkpoint)) as there:
            self._target.prefetch([one.target_name])
            there.prefetch([other.target_name])
            return all(
                count_different(
                    self._target.rows(one.target_name, first, min(first + step, one.shape[0])),
                    there.rows(other.target_name, first, min(first + step, one.shape[0])),
                )
                == 0
                for first in range(0, one.shape[0], step)
            )

    def shows_wrong_rows(self, move: Move, rows: Tensor) -> bool:
        """Return whether ``rows``, the last that were read, differ from those in the other layout."""
        heads = move.role.n_heads(self._params) if move.role else None
        if not heads:
            return False
        if move.heads:
            return count_different(rows, self._stored) > 0
        order = rows_in_other_layout(len(rows), move.shape[0] // heads, self._layout)
        return count_different(rows, rows.index_select(0, order)) > 0

    def _prefetch(self, names: Sequence[str]) -> None:
        self._target.prefetch([self._moves[name].target_name for name in names])

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        move = self._moves[name]
        self._stored = rows = self._target.rows(move.target_name, first, last)
        if not move.heads:
            return rows
        order = rows_in_other_layout(last - first, move.shape[0] // move.heads, self._layout)
        out = self._ordered.tensor(rows.shape, rows.dtype)
        return torch.index_select(rows, 0, order, out=out)
