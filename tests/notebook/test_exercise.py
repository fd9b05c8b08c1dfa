"""The checker of notebook 3: it names the mistake of a reordering that a reader wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints
from torch import Tensor

from llamaconv import sample_path
from llamaconv.notebook import lesson

SPECIMEN = lesson.open_specimen(sample_path())
N_HEADS, N_KV_HEADS = SPECIMEN.params.n_heads, SPECIMEN.params.n_kv_heads


def right(w: Tensor, n_heads: int) -> Tensor:
    return w.view(n_heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def by_index(w: Tensor, n_heads: int) -> Tensor:
    half = w.shape[0] // n_heads // 2
    order = [
        h * 2 * half + i + s * half for h in range(n_heads) for i in range(half) for s in (0, 1)
    ]
    return w[order]


def reverse(w: Tensor, n_heads: int) -> Tensor:
    return w.view(n_heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


def only_many_heads(w: Tensor, n_heads: int) -> Tensor:
    return right(w, n_heads) if n_heads == N_HEADS else w


def in_place(w: Tensor, n_heads: int) -> Tensor:
    w[:] = right(w, n_heads).clone()
    return w


@pytest.mark.parametrize("reorder", [right, by_index, in_place])
def test_right_reordering_passes(reorder: Callable[[Tensor, int], Tensor]) -> None:
    check = lesson.check_reorder(reorder, SPECIMEN)
    assert check.is_right
    assert repr(check).startswith("✓ right")


@pytest.mark.parametrize(
    ("reorder", "mistake", "words"),
    [
        (lambda w, n: w, "not reordered", "where they were"),
        (only_many_heads, "only q", "k's rows"),
        (lambda w, n: right(w, N_HEADS), "wrong kv heads", "Use n_heads"),
        (reverse, "wrong direction", "from interleaved to half_split"),
        (lambda w, n: right(right(w, n), n), "twice", "second time"),
        (lambda w, n: right(w, 1), "heads ignored", "as one head"),
        (lambda w, n: w.flip(0), "another order", "row 0 belongs there"),
        (lambda w, n: None, "no tensor", "NoneType"),
        (lambda w, n: w.view(n, -1), "wrong shape", "reshape"),
        (lambda w, n: w.flip(1), "changed rows", "within a row"),
        (lambda w, n: w + 1, "changed rows", "within a row"),
        (lambda w, n: torch.cat([w[:1], w[:-1]]), "lost rows", "twice"),
        (lambda w, n: w[0] / 0 + {}, "an error", "TypeError"),
    ],
)
def test_each_mistake_is_named(
    reorder: Callable[[Tensor, int], Tensor], mistake: str, words: str
) -> None:
    check = lesson.check_reorder(reorder, SPECIMEN)
    assert check.mistake == mistake
    assert words in check.detail
    assert not check.is_right
    assert "✗" in check._repr_html_()


def test_error_text_is_escaped_in_html() -> None:
    def reorder(w: Tensor, n_heads: int) -> Tensor:
        raise ValueError("<script>")

    assert "<script>" not in lesson.check_reorder(reorder, SPECIMEN)._repr_html_()


def test_right_reordering_passes_on_an_untrained_model(tmp_path: Path) -> None:
    folder = checkpoints.write_model(tmp_path / "new", replace(checkpoints.GQA, n_layers=1))
    specimen = lesson.open_specimen(folder)
    assert lesson.check_reorder(right, specimen).is_right
    assert lesson.check_reorder(reverse, specimen).mistake == "wrong direction"


def rotate_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_programs_are_compared_with_the_package() -> None:
    table = lesson.compare_programs(
        SPECIMEN,
        halves=(None, rotate_halves),
        neighbours=(right, rotate_neighbours),
        broken=(None, rotate_neighbours),
    )
    small = "< 0.0001"
    assert table.rows[:2] == [("halves", small, small), ("neighbours", small, small)]
    name, at_0, largest = table.rows[2]
    assert (name, at_0) == ("broken", small)
    assert float(largest) > 0.5
