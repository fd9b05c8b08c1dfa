"""Write several roles as one tensor: its chunks as runs of the rows of each.

Nothing is put together in memory. A chunk's blocks are those of its runs, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamaconv.checkpoint.fused import strips
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.convert.output import Blocks, Written
from llamaconv.model.names import FUSED, whole
from llamaconv.plan.plan import Move, Plan

Run = tuple[str, int, int]
"""A tensor of the plan, and which of its rows, half-open."""


@dataclass(frozen=True)
class Joined:
    """A tensor of the target that several moves fill.

    Attributes:
        tensor: Its name, dtype and shape.
        axis: The axis along which TorchTitan cuts it into chunks. If that is not the first, each
            run is one slab of the first axis.
        runs: What it consists of, in the order in which it is stored.
    """

    tensor: TensorInfo
    axis: int
    runs: tuple[Run, ...]

    def chunk(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[Run]:
        """Return what a chunk of whole last axes consists of."""
        begin, end = offsets[self.axis], offsets[self.axis] + sizes[self.axis]
        if self.axis:
            return [(name, begin, end) for name, *_ in self.runs]
        found, at = [], 0
        for name, first, last in self.runs:
            top, bottom = max(begin - at, 0), min(end - at, last - first)
            if top < bottom:
                found.append((name, first + top, first + bottom))
            at += last - first
        return found


def joined_tensors(plan: Plan) -> dict[str, Joined]:
    """Return the tensors of a target that hold several roles, by name."""
    moves: dict[str, dict[str, Move]] = {}
    for move in plan.stored:
        if (name := whole(move.target_name)) != move.target_name:
            moves.setdefault(name, {})[move.place[0]] = move
    params = plan.params
    found = {}
    for name, parts in moves.items():
        assert params is not None
        fused = next(one for one in FUSED.values() if set(one.parts) == parts.keys())
        runs = tuple(
            (parts[role].target_name, first, last)
            for role, first, last in strips(fused.name, params)
        )
        dtype = next(iter(parts.values())).dtype
        tensor = TensorInfo(name, dtype, fused.shape(params))
        found[name] = Joined(tensor, 1 if len(tensor.shape) > 2 else 0, runs)
    return found


class JoinedBlocks:
    """The rows of several tensors as those of one; see `llamaconv.convert.output.Blocks`."""

    def __init__(self, blocks: Blocks, runs: Sequence[Run]) -> None:
        """Join ``runs`` of the tensors that ``blocks`` has."""
        self._blocks = blocks
        self._runs = runs

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:  # noqa: ARG002
        """Yield rows ``first`` to ``last`` (excluded) of all runs, in order."""
        for part, begin, end in self._parts(first, last):
            yield from self._blocks.blocks(part, begin, end)

    def _parts(self, first: int, last: int) -> Iterator[Run]:
        """Yield the runs that rows ``first`` to ``last`` consist of."""
        at = 0
        for part, top, bottom in self._runs:
            begin, end = max(first - at, 0), min(last - at, bottom - top)
            if begin < end:
                yield part, top + begin, top + end
            at += bottom - top

    def expect(self, name: str, first: int, last: int, kept: int) -> None:  # noqa: ARG002
        """Prepare for rows ``first`` to ``last``, of which ``kept`` are already there."""
        for part, begin, end in self._parts(first + kept, last):
            self._blocks.expect(part, begin, end, 0)

    def is_needed_again(self, name: str) -> bool:  # noqa: ARG002
        """Return False: rows of several tensors are of no use for another."""
        return False

    def wrote(self, written: Written) -> None:
        """Note nothing."""

    def is_valid(self, name: str) -> bool:  # noqa: ARG002
        """Return whether no value of any of the tensors has overflowed so far."""
        return all(self._blocks.is_valid(part) for part, *_ in self._runs)
