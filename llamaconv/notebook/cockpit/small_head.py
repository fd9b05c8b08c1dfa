"""Real q and k of one head, cut down to a few pairs so that each can be seen.

Shapes: P positions, D rows of the small head, F its pairs (D/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llamaconv.model import rope
from llamaconv.model.names import Layout
from llamaconv.notebook.lesson.rotation import inverse_frequencies, projected
from llamaconv.notebook.lesson.specimen import Specimen

# Eight rows are the smallest head in which every wrong reordering is wrong.
PAIRS = 4
# The place in the excerpt of the token that q belongs to; k belongs to the one before it.
_TOKEN = 5


@dataclass(frozen=True)
class SmallHead:
    """The first pairs of one head, as a head of its own.

    Attributes:
        q: Numbers of q (D,) in half_split order, before the rotation, rounded.
        k: Numbers of k (D,), likewise.
        speeds: Radians per position of each pair (F,), rounded to 5 digits.
        rows: For each number, its row in the head that it comes from (D,).
        model: The name of the model.
        unit: What a token is, such as "byte".
    """

    q: tuple[float, ...]
    k: tuple[float, ...]
    speeds: tuple[float, ...]
    rows: tuple[int, ...]
    model: str
    unit: str

    @property
    def digits(self) -> int:
        """How many decimals show a score: 2, and more if q and k are small."""
        largest = math.hypot(*self.q) * math.hypot(*self.k)
        return max(2, 2 - _magnitude(largest))

    def products(
        self, rows: Layout, rotation: Layout, position: int, distance: int
    ) -> tuple[float, ...]:
        """Return q × k of each pair that the rotation joins (F,); their sum is the score.

        Args:
            rows: The order of the rows.
            rotation: The layout for which the rotation is written.
            position: The position of k; q is ``distance`` further on.
            distance: The distance of the two.
        """
        ends = torch.tensor([position + distance, position])
        turned_2HD = rope.rotate(
            torch.stack([self._ordered(self.q, rows), self._ordered(self.k, rows)]),
            rope.angles(ends, torch.tensor(self.speeds)),
            rotation,
        )
        product_D = turned_2HD.prod(0)[0]
        half = len(self.speeds)
        pairs = product_D.view(2, half).sum(0)
        if rotation == "interleaved":
            pairs = product_D.view(half, 2).sum(1)
        return tuple(pairs.tolist())

    def _ordered(self, numbers: tuple[float, ...], rows: Layout) -> Tensor:
        return rope.relayout(torch.tensor(numbers), 1, "half_split", rows)[None]


def small_head(specimen: Specimen, head: int = 0) -> SmallHead:
    """Return the first pairs of a head of the first layer, for two neighbouring tokens."""
    params = specimen.params
    half = params.head_dim // 2
    rows = [*range(PAIRS), *range(half, half + PAIRS)]
    q_PHD, k_PGD = projected(specimen, "half_split", specimen.excerpt[: _TOKEN + 1])
    q_D = q_PHD[-1, head, rows]
    k_D = k_PGD[-2, head * params.n_kv_heads // params.n_heads, rows]
    speeds_F = inverse_frequencies(specimen)[:PAIRS]
    return SmallHead(
        q=_rounded(q_D, 2 - _magnitude(q_D.abs().max().item())),
        k=_rounded(k_D, 2 - _magnitude(k_D.abs().max().item())),
        speeds=_rounded(speeds_F, 5),
        rows=tuple(rows),
        model=specimen.name,
        unit=specimen.unit,
    )


def _magnitude(size: float) -> int:
    """Return the power of ten of the first digit, such as -2 for 0.05."""
    return math.floor(math.log10(size)) if size else 0


def _rounded(numbers: Tensor, digits: int) -> tuple[float, ...]:
    # The sum removes the sign of a zero. Every version of torch gives these digits.
    return tuple(round(number, digits) + 0.0 for number in numbers.tolist())
