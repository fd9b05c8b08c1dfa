"""Which part of a tensor each rank of a mesh holds, by torch's rules for a DTensor; without torch.

A mesh numbers its ranks along one or several dimensions, and for each dimension a placement says
how the tensor is spread along it: a copy each, or a cut along one axis. A cut makes chunks as
``torch.chunk`` does: all as long as the first, but the last ones, which may be shorter or empty.

A strided cut is made after the cuts to the right of it, though it is written before them: the axis
is first cut into ``factor`` chunks, each of those is cut over the ranks, and a rank gets one part
of each. Source: torch/distributed/tensor/placement_types.py, `Shard` and `_StridedShard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

Run = tuple[int, int]
"""Elements along an axis, half-open."""

# Runs along an axis that one rank may hold; real ones have one, or a few if a strided cut is uneven.
_MOST_RUNS = 4096


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut along one axis: over how many ranks, which of them, and the factor of a strided cut."""

    n_ranks: int
    rank: int
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a rank's part: where it is in the tensor, where in the part, and its shape."""

    start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: Sequence[int], cuts: Sequence[Sequence[Cut]]) -> tuple[tuple[int, ...], list[Box]]:
    """Return what one rank holds of a tensor.

    Args:
        shape: The shape of the tensor.
        cuts: For each axis its cuts, in the order of the mesh's dimensions.

    Returns:
        The shape of the rank's part, and the rectangles that it consists of: one, unless a strided
        cut took several stretches; none if the part is empty.

    Raises:
        ValueError: A strided cut makes more stretches than any checkpoint has.
    """
    axes = [_runs(length, of_axis) for length, of_axis in zip(shape, cuts, strict=True)]
    local = tuple(sum(last - first for first, last in runs) for runs in axes)
    if 0 in local:
        return local, []
    placed = []
    for runs in axes:
        at, along = 0, []
        for first, last in runs:
            along.append((first, at, last - first))
            at += last - first
        placed.append(along)
    found = [
        Box(*(tuple(part[what] for part in parts) for what in range(3)))
        for parts in product(*placed)
    ]
    return local, found


def _runs(length: int, cuts: Sequence[Cut]) -> list[Run]:
    """Return which elements of an axis are left after all cuts, in order."""
    runs: list[Run] = [(0, length)]
    for cut in cuts:
        if cut.factor > _MOST_RUNS:
            raise ValueError(f"a strided cut has the factor {cut.factor}")
        parts = (_chunk(runs, cut.factor, number) for number in range(cut.factor))
        runs = _joined(run for part in parts for run in _chunk(part, cut.n_ranks, cut.rank))
        if len(runs) > _MOST_RUNS:
            raise ValueError(f"a strided cut makes {len(runs)} stretches of one axis")
    return runs


def _chunk(runs: Sequence[Run], n_chunks: int, number: int) -> list[Run]:
    """Return one of the chunks that ``torch.chunk`` makes of the elements in ``runs``."""
    length = sum(last - first for first, last in runs)
    size = -(-length // n_chunks)
    begin, end = number * size, (number + 1) * size
    found, at = [], 0
    for first, last in runs:
        low, high = max(begin, at), min(end, at + last - first)
        if low < high:
            found.append((first + low - at, first + high - at))
        at += last - first
    return found


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Return the same elements with runs that follow each other joined."""
    joined: list[Run] = []
    for first, last in runs:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return joined
