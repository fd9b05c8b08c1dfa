"""The re-ordering done right, and done wrong on purpose, as one table.

Each way takes the `half_split` rows that a Hugging Face folder holds and says what a converter
makes of them; the model then turns `interleaved` pairs, whatever it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llamaconv.params import LlamaParams
from llamaconv.rope import half_split_to_interleaved, interleaved_to_half_split
from llamaconv.tables import Table

Reorder = Callable[[Tensor, int], Tensor]
"""Rows of a weight and the heads to count in them, to the rows re-ordered."""


@dataclass(frozen=True)
class Way:
    """What becomes of the rows of q and of k. ``miscounts`` counts k's heads wrongly."""

    name: str
    what: str
    q: Reorder
    k: Reorder
    miscounts: bool = False

    def __repr__(self) -> str:
        return f"<Way {self.name}: {self.what}>"

    def apply(self, role: str, rows: Tensor, params: LlamaParams) -> Tensor:
        """What this way makes of the half_split ``rows`` of a tensor; others than q, k stay."""
        if role == "wq":
            return self.q(rows, params.n_heads)
        if role == "wk":
            heads = wrong_kv_heads(params) if self.miscounts else params.n_kv_heads
            return self.k(rows, heads or params.n_kv_heads)
        return rows


def _stay(rows: Tensor, n_heads: int) -> Tensor:
    return rows


def _twice(rows: Tensor, n_heads: int) -> Tensor:
    return half_split_to_interleaved(half_split_to_interleaved(rows, n_heads), n_heads)


_once, _back = half_split_to_interleaved, interleaved_to_half_split

RIGHT = Way("right", "q and k re-ordered, each by its own heads", _once, _once)

WRONG_WAYS = (
    Way("not re-ordered", "only the names were changed", _stay, _stay),
    Way("only q", "q re-ordered, k forgotten", _once, _stay),
    Way(
        "wrong kv heads",
        "k re-ordered by a number of heads that is not its own",
        _once,
        _once,
        miscounts=True,
    ),
    Way("wrong direction", "the re-ordering of the way back", _back, _back),
    Way("twice", "re-ordered although it had been already", _twice, _twice),
)


def wrong_kv_heads(params: LlamaParams) -> int | None:
    """A number of heads that k does not have and that divides its rows; q's where possible.

    None where there is none: with one head of k and one of q nothing can be miscounted.
    """
    for heads in (params.n_heads, 1, 2):
        if heads != params.n_kv_heads and params.kv_rows % (2 * heads) == 0:
            return heads
    return None


def wrong_ways(params: LlamaParams) -> tuple[Way, ...]:
    """Those that can be gone with a model of these parameters."""
    return tuple(way for way in WRONG_WAYS if not way.miscounts or wrong_kv_heads(params))


def ways(params: LlamaParams) -> tuple[Way, ...]:
    """The right one, then the wrong ones."""
    return (RIGHT, *wrong_ways(params))


def ways_table(params: LlamaParams) -> Table:
    """What each way does, in words."""
    return Table(("way", "what the converter did"), [(w.name, w.what) for w in ways(params)])
