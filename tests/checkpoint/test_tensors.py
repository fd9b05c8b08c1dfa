"""Windows of rows, and which rows a piece has."""

from pathlib import Path

import pytest

from llamaconv.checkpoint.tensors import Piece, TensorInfo

FILE = Path("file")


def tensor(*shape: int) -> TensorInfo:
    return TensorInfo("a", "float32", shape, (Piece(FILE, 0, (0,) * len(shape), shape),))


@pytest.mark.parametrize(
    ("n_bytes", "unit", "rows", "expected"),
    [
        (16, 1, (0, 10), [(0, 4), (4, 8), (8, 10)]),
        (16, 1, (3, 8), [(3, 7), (7, 8)]),
        (100, 1, (0, 10), [(0, 10)]),
        (1, 1, (0, 2), [(0, 1), (1, 2)]),
        (20, 2, (0, 10), [(0, 4), (4, 8), (8, 10)]),
        (1, 5, (0, 10), [(0, 5), (5, 10)]),
        (24, 2, (3, 7), [(2, 8)]),
    ],
)
def test_windows_are_whole_units_within_the_bytes(
    n_bytes: int, unit: int, rows: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    assert list(tensor(10, 1).windows(n_bytes, unit, *rows)) == expected


def test_empty_tensor_has_no_windows() -> None:
    assert list(tensor(2**60, 0).windows(16)) == []


def test_scalar_has_one_window_and_one_row() -> None:
    scalar = tensor()
    assert list(scalar.windows(16)) == [(0, 1)]
    assert scalar.pieces[0].rows(0, 1) == range(1)


def test_piece_has_the_rows_that_overlap_it() -> None:
    piece = Piece(FILE, 100, (4, 2), (3, 5))
    assert piece.rows(0, 10) == range(4, 7)
    assert piece.rows(5, 6) == range(5, 6)
    assert not piece.rows(0, 4)
    assert piece.offset_of(6, 4) == 100 + 2 * 5 * 4
