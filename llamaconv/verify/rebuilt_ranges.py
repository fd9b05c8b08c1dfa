"""Check a target against the ranges that were fetched, of a source that lists no digests.

While a source in a store is converted, the digest of each range is noted as it came. Here the bytes
of each range are rebuilt from the target, with the rows of q and k brought back by index arithmetic
that shares no code with the engine. If all have the digests noted, the target has every bit that
was fetched, in the right order of rows, and nothing is fetched again.

Limit: a cast hides bytes, and what an interrupted run fetched was noted by nobody;
`RebuiltRanges.unknown` has these files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from llamaconv.checkpoint.buffers import scratch
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fetch_ahead import Fetched
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Piece
from llamaconv.checkpoint.weight_values import OddValues, count_not_finite
from llamaconv.plan.plan import Move, Plan
from llamaconv.report.errors import first_few
from llamaconv.report.progress import Progress
from llamaconv.verify.bits_and_scores import WINDOW_BYTES, too_odd
from llamaconv.verify.rebuilt import RebuiltReader, rebuild_files, untied_copies
from llamaconv.verify.results import Check


@dataclass
class _Range:
    """A range that was fetched, and the digest of what was rebuilt of it so far."""

    first: int
    last: int
    digest: str
    done: int = 0
    rebuilt: Any = field(default_factory=xxhash.xxh3_128)


@dataclass(frozen=True)
class _Part:
    """A piece of a file, and the move whose target has its rows."""

    piece: Piece
    move: Move
    n_bytes: int

    @property
    def first(self) -> int:
        """Its first byte in the file."""
        return self.piece.offset


@dataclass
class _Outcome:
    """What rebuilding one file showed."""

    wrong: int
    shows_wrong_rows: bool
    odd: list[OddValues]


class RebuiltRanges:
    """The files of a plan's source, as far as ranges of them were fetched.

    Attributes:
        files: Names of the files of which all that the target has was fetched.
        unknown: Why each other file of weights cannot be compared, by name.
    """

    def __init__(self, plan: Plan, fetched: Sequence[Fetched]) -> None:
        """Find out which ranges the target of ``plan`` has whole."""
        self.plan = plan
        self.unknown: dict[str, str] = {}
        self._copies: list[tuple[Move, Move]] = []
        self._ranges: dict[str, list[_Range]] = defaultdict(list)
        for name, first, last, digest in sorted(set(fetched)):
            self._ranges[name].append(_Range(first, last, digest))
        self._parts: dict[str, list[_Part]] = {}
        for name, found in self._found_parts().items():
            parts = [part for _, part in sorted(found.items()) if part.n_bytes]
            if any(part.piece.strides for part in parts):
                self.unknown[name] = "it has tensors that are views of others"
            elif not _are_covered(parts, self._ranges[name]):
                self.unknown[name] = "an interrupted run fetched a part of it"
            else:
                self._parts[name] = parts
        for move in plan.written:
            tensor = plan.source.tensors[move.source]
            if tensor.dtype != move.dtype:
                for piece in tensor.pieces:
                    self.unknown[piece.file.name] = "the target has other bits after a cast"
                    self._parts.pop(piece.file.name, None)

    def _found_parts(self) -> dict[str, dict[int, _Part]]:
        """Return the parts of each file by their offsets."""
        found: dict[str, dict[int, _Part]] = defaultdict(dict)
        for move in self.plan.written:
            tensor = self.plan.source.tensors[move.source]
            for piece in tensor.pieces:
                n_bytes = DTYPE_BYTES[tensor.dtype]
                for length in piece.shape:
                    n_bytes *= length
                part = _Part(piece, move, n_bytes)
                other = found[piece.file.name].setdefault(piece.offset, part)
                # A tied head and its embedding are the same bytes of the file.
                if other.move is not move and (other.move, move) not in self._copies:
                    self._copies.append((other.move, move))
        return found

    @property
    def files(self) -> list[str]:
        """Names of the files that are rebuilt."""
        return [*self._parts]

    @property
    def remark(self) -> str:
        """What was not compared with what came, and how to; for the end of a detail."""
        if not self.unknown:
            return ""
        reasons = sorted(set(self.unknown.values()))
        return (
            f"; not compared with the source: {first_few(self.unknown, 3)} "
            f"({'; '.join(reasons)}). 'llamaconv verify SRC DST' fetches it again and does"
        )

    def check(self, target: Checkpoint, progress: Progress, n_threads: int = 1) -> Check:
        """Rebuild each range and compare its digest.

        Args:
            target: The opened target, with its parameters.
            progress: Called with "verify", the bytes done, and the bytes of all these files.
            n_threads: How many files to rebuild at a time.

        Returns:
            The check, whose value counts files with another digest. The control counts those that
            would have another if the rows of q and k had kept their order.
        """
        total = sum(part.n_bytes for parts in self._parts.values() for part in parts)
        outcomes = rebuild_files(
            self.plan, target, self.files, self._rebuild, total, progress, n_threads
        )
        wrong = {name: one.wrong for name, one in outcomes.items() if one.wrong}
        untied = untied_copies(self.plan, target, self._copies)
        odd = too_odd([one for outcome in outcomes.values() for one in outcome.odd])
        control = sum(bool(one.wrong) or one.shows_wrong_rows for one in outcomes.values())
        n_ranges = sum(len(self._ranges[name]) for name in self.files)
        detail = (
            f"{n_ranges} ranges of {len(outcomes)} {'files' if len(outcomes) > 1 else 'file'}, rebuilt "
            "from the target, have the digests of what the store sent; nothing was fetched again"
        )
        if untied:
            detail = f"{untied[0]}: not the same as what it is tied to"
        elif wrong:
            shown = (
                f"{name}: {n} of {len(self._ranges[name])} ranges" for name, n in wrong.items()
            )
            detail = (
                f"{len(wrong)} files differ from what the store sent, when rebuilt from the target: "
                f"{first_few(shown, 3)}"
            )
        elif odd:
            detail += f", but {odd}"
        value = float(len(wrong) + len(untied))
        return Check("fetched", not value and not odd, value, float(control), detail)

    def _rebuild(self, name: str, reader: RebuiltReader, count: Callable[[int], None]) -> _Outcome:
        ranges = self._ranges[name]
        shows, odd = False, []
        begin, move = 0, None
        memory = scratch(0)
        for part in self._parts[name]:
            if part.move is not move:
                move = part.move
                reader.prefetch([move.source])
            at, nan, infinite = part.first, 0, 0
            for rows, wrong_rows in _rows(part, reader):
                shows = shows or wrong_rows
                found = count_not_finite(rows)
                nan, infinite = nan + found[0], infinite + found[1]
                n_bytes = rows.numel() * DTYPE_BYTES[part.move.dtype]
                if len(memory) < n_bytes:
                    memory = scratch(n_bytes)
                torch.frombuffer(memory, dtype=rows.dtype)[: rows.numel()].copy_(rows.reshape(-1))
                begin = _update(ranges, begin, at, memory[:n_bytes])
                at += n_bytes
                count(n_bytes)
            if nan or infinite:
                odd.append(OddValues(part.move.target_name, nan, infinite))
        wrong = sum(
            one.done < one.last - one.first or one.rebuilt.hexdigest() != one.digest
            for one in ranges
        )
        return _Outcome(wrong, shows, odd)


def _rows(part: _Part, reader: RebuiltReader) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield the rows of a part, window by window, and whether rows in the other layout would show."""
    move, piece = part.move, part.piece
    top, n_rows = (piece.start[0], piece.shape[0]) if piece.shape else (0, 1)
    unit = move.shape[0] // move.heads if move.heads else 1
    row_bytes = max(1, move.nbytes // max(1, move.shape[0] if move.shape else 1))
    step = max(1, WINDOW_BYTES // (unit * row_bytes)) * unit
    columns = tuple(
        slice(start, start + n) for start, n in zip(piece.start[1:], piece.shape[1:], strict=True)
    )
    # Heads are whole, though the piece may begin and end inside one.
    for first in range(top - top % unit, top + n_rows, step):
        last = min(first + step, top + n_rows + -(top + n_rows) % unit)
        rows = reader.rows(move.source, first, last)
        shows = reader.shows_wrong_rows(move, rows)
        if piece.shape:
            rows = rows[max(first, top) - first : min(last, top + n_rows) - first]
            rows = rows[(slice(None), *columns)]
        yield rows, shows


def _update(ranges: Sequence[_Range], begin: int, at: int, content: memoryview) -> int:
    """Add rebuilt bytes of a file to the ranges that they belong to.

    Args:
        ranges: The ranges of the file, in order.
        begin: The first range that later bytes may belong to.
        at: Where in the file the bytes are.
        content: The bytes.

    Returns:
        The next ``begin``.
    """
    while begin < len(ranges) and ranges[begin].last <= at:
        begin += 1
    for one in ranges[begin:]:
        if one.first >= at + len(content):
            break
        first, last = max(one.first, at), min(one.last, at + len(content))
        # After a gap nothing more fits.
        if first < last and one.first + one.done == first:
            one.rebuilt.update(content[first - at : last - at])
            one.done += last - first
    return begin


def _are_covered(parts: Sequence[_Part], ranges: Sequence[_Range]) -> bool:
    """Return whether every byte of ``parts`` was fetched, and nothing else."""
    spans: list[list[int]] = []
    for part in parts:
        if spans and part.first <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], part.first + part.n_bytes)
        else:
            spans.append([part.first, part.first + part.n_bytes])
    at = 0
    for first, last in spans:
        done = first
        while at < len(ranges) and ranges[at].first < last:
            one = ranges[at]
            if one.first > done or one.last > last or one.first < first:
                return False
            done = max(done, one.last)
            at += 1
        if done < last:
            return False
    return at == len(ranges)
