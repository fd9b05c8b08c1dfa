"""Where a head looks, right and wrong: attention probabilities by way of re-ordering."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llamaconv.lesson.specimen import Specimen
from llamaconv.lesson.ways import RIGHT, ways


@dataclass(frozen=True, repr=False)
class AttentionMaps:
    """Maps ``(positions, positions)`` of one head, by way; the right one first.

    ``moved`` is the share of the attention that a wrong way gives to other positions than the
    right one does, mean over all positions.
    """

    layer: int
    head: int
    by_way: dict[str, Tensor]
    unit: str

    @property
    def moved(self) -> dict[str, float]:
        right = self.by_way[RIGHT.name]
        return {
            name: _moved(right, found).item()
            for name, found in self.by_way.items()
            if name != RIGHT.name
        }

    def __repr__(self) -> str:
        return f"<AttentionMaps of layer {self.layer}, head {self.head}: {', '.join(self.by_way)}>"


def attention_maps(specimen: Specimen, layer: int, head: int) -> AttentionMaps:
    """One head on the excerpt, in every way."""
    by_way = {way.name: specimen.attention(way, layer)[head] for way in ways(specimen.params)}
    return AttentionMaps(layer, head, by_way, specimen.unit)


def _moved(right: Tensor, wrong: Tensor) -> Tensor:
    return (wrong - right).abs().sum(-1).mean() / 2
