"""Pairs of rows as points that turn, and the same turn written in both ways.

The vectors are real ones: q of the first layer for the first token of the text. Its input is
the embedding alone, so no layer has to be run before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llamaconv import rope
from llamaconv.keys import Layout
from llamaconv.lesson.specimen import Specimen
from llamaconv.tables import Table


def projected(specimen: Specimen, layout: Layout, tokens_P: Tensor) -> tuple[Tensor, Tensor]:
    """q ``(P, H, D)`` and k ``(P, G, D)`` of the first layer, before rotation, in ``layout``."""
    weights = specimen.half_split if layout == "half_split" else specimen.interleaved
    params = specimen.params
    x_PC = F.embedding(tokens_P, weights["tok_embeddings", None])
    h_PC = F.rms_norm(x_PC, (params.dim,), weights["attention_norm", 0], params.norm_eps)
    q, k = (
        (h_PC @ weights[role, 0].T).unflatten(-1, (-1, params.head_dim)) for role in ("wq", "wk")
    )
    return q, k


def inverse_frequencies(specimen: Specimen) -> Tensor:
    """Radians per position of each pair of the specimen's heads, shape ``(F,)``."""
    params = specimen.params
    return rope.inverse_frequencies(params.head_dim, params.rope_theta, params.rope_scaling)


@dataclass(frozen=True, repr=False)
class TurnedPairs:
    """Some pairs of one head at every position, as points.

    ``pairs`` are pair numbers; ``points`` has shape ``(positions, len(pairs), 2)``;
    ``per_position`` radians for each.
    """

    pairs: tuple[int, ...]
    head_dim: int
    per_position: tuple[float, ...]
    points: Tensor

    def __repr__(self) -> str:
        return (
            f"<TurnedPairs {self.pairs} of a head of {self.head_dim}, {len(self.points)} positions>"
        )


def turned_pairs(specimen: Specimen, positions: int = 13) -> TurnedPairs:
    """Four pairs of head 0, from the fastest to a slow one, at positions 0, 1, 2, …"""
    n_pairs = specimen.params.head_dim // 2
    pairs = tuple(sorted({0, 1, n_pairs // 4, n_pairs // 2}))
    q_1HD, _ = projected(specimen, "half_split", specimen.excerpt[:1])
    inverse_F = inverse_frequencies(specimen)
    q_PHD = rope.rotate_half_split(
        q_1HD.expand(positions, -1, -1), rope.angles(torch.arange(positions), inverse_F)
    )
    points_PF2 = q_PHD[:, 0].unflatten(-1, (2, n_pairs)).transpose(1, 2)
    return TurnedPairs(
        pairs,
        specimen.params.head_dim,
        tuple(inverse_F[list(pairs)].tolist()),
        points_PF2[:, list(pairs)],
    )


def two_writings(specimen: Specimen, position: int = 5, n_pairs: int = 4) -> Table:
    """The first pairs of one head turned as complex numbers, and by cosine and sine."""
    half = specimen.params.head_dim // 2
    angles_1F = rope.angles(torch.tensor([position]), inverse_frequencies(specimen))
    split_1HD, _ = projected(specimen, "half_split", specimen.excerpt[:1])
    woven_1HD, _ = projected(specimen, "interleaved", specimen.excerpt[:1])
    # Head 0 of the first token; a pair's two numbers are one column of (2, F) or row of (F, 2).
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
        "turn, radians",
        "at position 0",
        "times e^(i·turn), interleaved",
        "cos and sin, half_split",
    )
    caption = f"q of head 0, turned to position {position}"
    return Table(columns, rows, caption=caption, right=columns)


def _point(numbers: Tensor, complex_number: bool = False) -> str:
    # The sum takes the sign off a zero.
    first, second = (round(number, 2) + 0.0 for number in numbers.tolist())
    return f"{first:.2f} {second:+.2f}i" if complex_number else f"({first:.2f}, {second:.2f})"
