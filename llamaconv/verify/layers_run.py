"""Where two checkpoints diverge: the result of `layers`."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from llamaconv.report.tables import Table

TOLERANCE = 1e-3
"""Relative difference that rounding may cause: float32 sums in another order, over all layers."""


@dataclass(frozen=True)
class Stage:
    """The activations after one part of the model.

    Attributes:
        name: embedding, a layer, or logits.
        so_far: Relative difference of the two sides, each on its own input.
        alone: The same, both on the first side's input: what this part does by itself.
    """

    name: str
    so_far: float
    alone: float


@dataclass(frozen=True, repr=False)
class LayersRun:
    """The result of running two checkpoints side by side.

    Attributes:
        stages: Every part of the model, in order.
        n_tokens: Number of tokens of the text.
        agreement: Share of positions at which both predict the same token.
        losses: Loss of each side in nats per token.
        is_cast: Whether a tensor has another dtype on each side, so that values may be rounded.
    """

    stages: tuple[Stage, ...]
    n_tokens: int
    agreement: float
    losses: tuple[float, float]
    is_cast: bool = False

    @property
    def first(self) -> str:
        """The first part that diverges by itself; empty if none does."""
        return next((one.name for one in self.stages if not one.alone <= TOLERANCE), "")

    @property
    def diverges(self) -> bool:
        """Whether any activation differs by more than rounding."""
        return any(not max(one.so_far, one.alone) <= TOLERANCE for one in self.stages)

    def summary(self) -> str:
        """Return the result in one line."""
        one, other = (f"{loss:.3f}" for loss in self.losses)
        apart = self.stages[-1].so_far
        differ = f"differ by {_short(apart)}" if isfinite(apart) else "are not finite"
        text = (
            f"logits {differ}; the same next token at "
            f"{self.agreement:.0%} of {self.n_tokens} positions; loss {one} and {other} nats per token"
        )
        if self.first:
            return f"the first part that diverges is: {self.first}; {text}"
        return f"{'differences add up' if self.diverges else 'no layer diverges'}; {text}"

    def table(self, most: int = 200) -> Table:
        """Return one row per part of the model."""
        rows = [
            (
                "✗" if not one.alone <= TOLERANCE else "✓",
                one.name,
                _short(one.so_far),
                _short(one.alone),
            )
            for one in self.stages
        ]
        columns = ("", "after", "so far", "by itself")
        caption = f"relative differences of activations; {self.summary()}"
        return Table(columns, rows, caption=caption, right=columns[2:], most=most)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes; differences that are not finite are null."""
        return {
            "first": self.first or None,
            "stages": [
                {
                    "name": one.name,
                    "so_far": one.so_far if isfinite(one.so_far) else None,
                    "alone": one.alone if isfinite(one.alone) else None,
                }
                for one in self.stages
            ],
            "tokens": self.n_tokens,
            "agreement": self.agreement,
            "losses": [loss if isfinite(loss) else None for loss in self.losses],
        }

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _short(value: float) -> str:
    if not isfinite(value):
        return "not finite"
    return f"{value:.2g}" if value > TOLERANCE else f"< {TOLERANCE:g}"
