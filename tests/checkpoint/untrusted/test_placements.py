"""Which part of a tensor each rank holds, against what ``torch.chunk`` and ``torch.cat`` give it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from llamaconv.checkpoint.untrusted.placements import Cut, boxes

# Of one mesh dimension: its extent, the axis that is cut and the factor of a strided cut, or None.
Dimension = tuple[int, tuple[int, int] | None]


def chunk(whole: Tensor, n_chunks: int, number: int, axis: int) -> Tensor:
    """As DTensor's `Shard._custom_chunk`: torch.chunk, with empty parts where it gives fewer."""
    parts = list(whole.chunk(n_chunks, axis))
    return parts[number] if number < len(parts) else whole.narrow(axis, 0, 0)


def part_by_torch(whole: Tensor, mesh: Sequence[Dimension], place: Sequence[int]) -> Tensor:
    for (extent, cut), index in zip(mesh, place, strict=True):
        if cut is not None:
            axis, factor = cut
            first = (chunk(whole, factor, number, axis) for number in range(factor))
            whole = torch.cat([chunk(one, extent, index, axis) for one in first], axis)
    return whole


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [
        ((10, 6), [(4, (0, 1))]),
        ((10, 6), [(4, (1, 1))]),
        ((3,), [(4, (0, 1))]),
        ((9, 7), [(2, (0, 1)), (3, (1, 1))]),
        ((9, 7), [(2, None), (3, (0, 1))]),
        ((13, 2), [(2, (0, 1)), (3, (0, 1))]),
        ((2, 9, 7), [(2, (1, 1)), (2, (2, 1))]),
        ((16, 3), [(2, (0, 2)), (2, (0, 1))]),
        ((81, 3), [(2, (0, 2)), (2, (0, 1))]),
        ((13, 3), [(2, (0, 1)), (2, (0, 2))]),
        ((13,), [(3, (0, 5))]),
        ((), [(4, None)]),
    ],
)
def test_boxes_are_what_torch_gives_each_rank(
    shape: tuple[int, ...], mesh: list[Dimension]
) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for place in product(*(range(extent) for extent, _ in mesh)):
        cuts: list[list[Cut]] = [[] for _ in shape]
        for (extent, cut), index in zip(mesh, place, strict=True):
            if cut is not None:
                cuts[cut[0]].append(Cut(extent, index, cut[1]))
        local, found = boxes(shape, cuts)
        expected = part_by_torch(whole, mesh, place)
        assert local == tuple(expected.shape)
        made = torch.full_like(expected, -1)
        for box in found:
            there = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            here = tuple(slice(a, a + n) for a, n in zip(box.local_start, box.shape, strict=True))
            made[here] = whole[there]
        assert torch.equal(made, expected)


def test_runs_that_follow_each_other_are_one_box() -> None:
    assert len(boxes((16, 3), [[Cut(2, 1, 2), Cut(2, 0)], []])[1]) == 1


@pytest.mark.parametrize("factor", [5000, 10**18])
def test_a_cut_into_more_stretches_than_any_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match="strided cut"):
        boxes((10**9,), [[Cut(2, 0, factor)]])
