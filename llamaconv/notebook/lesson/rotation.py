"""Pairs of rows as points that rotate, and one rotation written in two forms.

The vectors are real ones: q of the first layer for the first token of the text. Its input is the
embedding alone, so no layer has to run first.

Shapes: P positions, C width of the model, H heads of q, G heads of k, D rows of a head, F pairs
(D/2), S the pairs that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamaconv.model import forward, rope
from llamaconv.model.names import ROLES, Layout
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.report.tables import Table


def projected(specimen: Specimen, layout: Layout, tokens_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (P, H, D) and k (P, G, D) of the first layer, before the rotation."""
    weights = specimen.half_split if layout == "half_split" else specimen.interleaved
    params = specimen.params
    x_PC = specimen.embedded(tokens_P)
    h_PC = forward.norm(x_PC, weights["attention_norm", 0], params)
    its = {
        role: weights[role, 0]
        for role in forward.layer_roles(specimen.half_split.places, 0)
        if ROLES[role].heads
    }
    q, k = (forward.heads(h_PC @ its[role].T, its, role, params) for role in ("wq", "wk"))
    return q, k


def inverse_frequencies(specimen: Specimen) -> Tensor:
    """Return the radians per position of each pair of a head (F,)."""
    params = specimen.params
    return rope.inverse_frequencies(params.head_dim, params.rope_theta, params.rope_scaling)


@dataclass(frozen=True)
class RotatedPairs:
    """Some pairs of one head as points, at several positions.

    Attributes:
        pairs: The numbers of the pairs.
        head_dim: The rows of the head.
        per_position: The speed of each pair, in radians per position.
        points: The points (P, S, 2).
    """

    pairs: tuple[int, ...]
    head_dim: int
    per_position: tuple[float, ...]
    points: Tensor = field(repr=False)


def rotated_pairs(specimen: Specimen, positions: int = 13) -> RotatedPairs:
    """Return up to four pairs of head 0, from the fastest to a slow one, at the first positions."""
    n_pairs = specimen.params.head_dim // 2
    pairs = tuple(sorted({0, 1, n_pairs // 4, n_pairs // 2}))
    q_1HD, _ = projected(specimen, "half_split", specimen.excerpt[:1])
    inverse_F = inverse_frequencies(specimen)
    q_PHD = rope.rotate_half_split(
        q_1HD.expand(positions, -1, -1), rope.angles(torch.arange(positions), inverse_F)
    )
    points_PF2 = q_PHD[:, 0].unflatten(-1, (2, n_pairs)).transpose(1, 2)
    speeds = tuple(inverse_F[list(pairs)].tolist())
    return RotatedPairs(pairs, specimen.params.head_dim, speeds, points_PF2[:, list(pairs)])


@dataclass(frozen=True)
class Projection:
    """One number of q: one row of W_q times the input.

    Attributes:
        row: The number of the row in head 0.
        rows: The rows of head 0 (D, C), half_split.
        x: The input of the first layer for the first token of the text (C,).
        q: Their products (D,).
    """

    row: int
    rows: Tensor = field(repr=False)
    x: Tensor = field(repr=False)
    q: Tensor = field(repr=False)


def projection(specimen: Specimen, row: int = 3) -> Projection:
    """Return head 0 of W_q, an input and their product; ``row`` is the one to follow."""
    params = specimen.params
    x_PC = specimen.embedded(specimen.excerpt[:1])
    norm_C = specimen.half_split["attention_norm", 0]
    x_C = forward.norm(x_PC, norm_C, params)[0]
    rows_DC = specimen.half_split["wq", 0][: params.head_dim]
    return Projection(row, rows_DC, x_C, rows_DC @ x_C)


@dataclass(frozen=True)
class SameDistance:
    """One pair of q and of k as points, at two positions each that have the same distance.

    Attributes:
        positions: The two pairs of positions, of q and of k.
        q: The point of q at each of its positions (2, 2).
        k: The point of k at each of its positions (2, 2).
        products: What the pair adds to the score, for each of ``positions``.
    """

    positions: tuple[tuple[int, int], tuple[int, int]]
    q: Tensor = field(repr=False)
    k: Tensor = field(repr=False)
    products: tuple[float, float]


def same_distance(
    specimen: Specimen, pair: int = 1, at: tuple[int, int] = (3, 1), shift: int = 5
) -> SameDistance:
    """Return one pair of head 0 at the positions ``at`` of q and k, and at both plus ``shift``."""
    half = specimen.params.head_dim // 2
    q_1HD, k_1GD = projected(specimen, "half_split", specimen.excerpt[:1])
    moved = (at[0] + shift, at[1] + shift)
    points = []
    for x_1D, first, second in ((q_1HD[:, 0], at[0], moved[0]), (k_1GD[:, 0], at[1], moved[1])):
        angles_2F = rope.angles(torch.tensor([first, second]), inverse_frequencies(specimen))
        rotated_2D = rope.rotate_half_split(x_1D.expand(2, -1)[:, None], angles_2F)[:, 0]
        points.append(rotated_2D[:, [pair, pair + half]])
    q_22, k_22 = points
    first, second = (q_22 * k_22).sum(-1).tolist()
    return SameDistance((at, moved), q_22, k_22, (first, second))


def two_forms(specimen: Specimen, position: int = 5, n_pairs: int = 4) -> Table:
    """Return the first pairs of head 0, rotated as complex numbers and with cosine and sine."""
    half = specimen.params.head_dim // 2
    angles_1F = rope.angles(torch.tensor([position]), inverse_frequencies(specimen))
    split_1HD, _ = projected(specimen, "half_split", specimen.excerpt[:1])
    woven_1HD, _ = projected(specimen, "interleaved", specimen.excerpt[:1])
    # Head 0 of the first token. The two numbers of a pair are a column of (2, F), a row of (F, 2).
    before_2F = split_1HD[0, 0].view(2, half)
    by_cosine_2F = rope.rotate_half_split(split_1HD, angles_1F)[0, 0].view(2, half)
    as_complex_F2 = rope.rotate_interleaved(woven_1HD, angles_1F)[0, 0].view(half, 2)
    rows = [
        (
            pair,
            f"{angles_1F[0, pair]:.2f}",
            _point(before_2F[:, pair]),
            _point(as_complex_F2[pair], complex_number=True),
            _point(by_cosine_2F[:, pair]),
        )
        for pair in range(min(n_pairs, half))
    ]
    columns = (
        "pair",
        "angle θ, radians",
        "at position 0",
        "times e^(iθ), interleaved",
        "cosine and sine, half_split",
    )
    caption = f"q of head 0, rotated to position {position}"
    return Table(columns, rows, caption=caption, right=columns)


def _point(numbers: Tensor, complex_number: bool = False) -> str:
    # The sum removes the sign of a zero.
    first, second = (round(number, 2) + 0.0 for number in numbers.tolist())
    return f"{first:.2f} {second:+.2f}i" if complex_number else f"({first:.2f}, {second:.2f})"
