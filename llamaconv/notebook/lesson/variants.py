"""The reordering of q and k, done right and deliberately wrong.

Each variant takes the `half_split` rows of a Hugging Face folder and returns what a converter
would write. The model then rotates `interleaved` pairs, whatever it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from llamaconv.model.names import ROLES
from llamaconv.model.params import LlamaParams
from llamaconv.model.rope import half_split_to_interleaved, interleaved_to_half_split
from llamaconv.report.tables import Table

Reorder = Callable[[Tensor, int], Tensor]
"""Takes the rows of a weight and the number of heads in them; returns the rows reordered."""


@dataclass(frozen=True)
class ReorderVariant:
    """One way to reorder q and k.

    Attributes:
        name: Its name in pictures and tables.
        what: What the converter did.
        q: The reordering of q's rows.
        k: The reordering of k's rows.
        miscounts: Whether ``k`` is called with a wrong number of heads.
    """

    name: str
    what: str
    q: Reorder = field(repr=False)
    k: Reorder = field(repr=False)
    miscounts: bool = False

    def apply(self, role: str, rows: Tensor, params: LlamaParams) -> Tensor:
        """Return the half_split ``rows`` of a tensor as this variant leaves them.

        Args:
            role: The tensor's role. Only q and k are reordered, with their biases and norms.
            rows: Its rows.
            params: The model's parameters.
        """
        n_heads = ROLES[role].n_heads(params)
        if n_heads is None:
            return rows
        if role.startswith("wk") and self.miscounts:
            n_heads = wrong_kv_heads(params) or n_heads
        reorder = self.q if role.startswith(("wq", "q_")) else self.k
        return reorder(rows, n_heads)


def _unchanged(rows: Tensor, _n_heads: int) -> Tensor:
    return rows


def _twice(rows: Tensor, n_heads: int) -> Tensor:
    return half_split_to_interleaved(half_split_to_interleaved(rows, n_heads), n_heads)


_once, _reverse = half_split_to_interleaved, interleaved_to_half_split

RIGHT = ReorderVariant("right", "q and k reordered, each by its own heads", _once, _once)

NOT_REORDERED = ReorderVariant("not reordered", "only the names changed", _unchanged, _unchanged)

_WRONG = (
    NOT_REORDERED,
    ReorderVariant("only q", "q reordered, k forgotten", _once, _unchanged),
    ReorderVariant(
        "wrong kv heads", "k reordered by a wrong number of heads", _once, _once, miscounts=True
    ),
    ReorderVariant(
        "wrong direction", "the reordering of the reverse conversion", _reverse, _reverse
    ),
    ReorderVariant("twice", "reordered a second time", _twice, _twice),
)


def wrong_kv_heads(params: LlamaParams) -> int | None:
    """Return a wrong number of kv heads that still divides k's rows, preferably q's number.

    None if there is none: then the heads cannot be miscounted.
    """
    for heads in (params.n_heads, 1, 2):
        if heads != params.n_kv_heads and params.kv_rows % (2 * heads) == 0:
            return heads
    return None


def wrong_variants(params: LlamaParams) -> tuple[ReorderVariant, ...]:
    """Return the wrong variants that are possible with these parameters."""
    return tuple(one for one in _WRONG if not one.miscounts or wrong_kv_heads(params))


def variants(params: LlamaParams) -> tuple[ReorderVariant, ...]:
    """Return the right variant, then the wrong ones."""
    return (RIGHT, *wrong_variants(params))


def variants_table(params: LlamaParams) -> Table:
    """Return one row per variant: its name, and what the converter did."""
    return Table(
        ("variant", "what the converter did"), [(one.name, one.what) for one in variants(params)]
    )
