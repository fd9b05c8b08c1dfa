"""Attention maps of one head, right and in several ways wrong, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamaconv.figures.picture import Picture, drawing, picture
from llamaconv.figures.tiles import tiles

if TYPE_CHECKING:
    from llamaconv.lesson import AttentionMaps


def attention_maps(maps: AttentionMaps) -> Picture:
    """Small multiples: where each position of the excerpt looks, one map a way of re-ordering."""
    columns = 3
    rows = -(-len(maps.by_way) // columns)
    titled = {}
    for name, found in maps.by_way.items():
        share = maps.moved.get(name)
        note = f"\n{_percent(share)} of the attention moved" if share is not None else ""
        titled[f"{name}{note}"] = found.numpy()
    with drawing(8.8, 2.95 * rows + 0.4) as (figure, axes):
        labels = ("position looked at", "position that looks")
        drawn = tiles(axes, titled, columns, labels, cmap="viridis", vmin=0, vmax=1)
        figure.colorbar(drawn, ax=axes, shrink=0.6, label="attention probability")
        shares = maps.moved.values()
        return picture(
            figure,
            f"Attention maps of layer {maps.layer}, head {maps.head}, one a way of re-ordering: the "
            f"wrong ways have moved {_percent(min(shares))} to {_percent(max(shares))} of the attention "
            "to other positions than the right one.",
            f"Layer {maps.layer}, head {maps.head}, on {len(found)} {maps.unit}s of the text; each row "
            "of a map sums to 1. Moved: half the sum of the differences, mean of all positions.",
        )


def _percent(share: float) -> str:
    """To the next five percent, so that the words do not depend on the last bits."""
    return f"{round(share * 20) * 5}%"
