"""The re-ordering of one head, as a picture in which one can follow a row."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from llamaconv.figures.picture import Picture, drawing, picture


def head_layouts(head_dim: int = 16) -> Picture:
    """Where each row of one head goes between the two layouts; a line a row, a colour a pair."""
    half = head_dim // 2
    with drawing(6.4, 0.27 * head_dim + 1.0) as (figure, axes):
        colours = plt.get_cmap("viridis")
        for row in range(head_dim):
            pair, second = row % half, row >= half
            target = 2 * pair + second
            colour = colours(pair / max(1, half - 1) * 0.9)
            line = "--" if second else "-"
            axes.plot([1.15, 2.85], [row, target], line, color=colour, linewidth=1.6)
            for x, y in ((1, row), (3, target)):
                place = {"ha": "center", "va": "center", "fontsize": 9}
                face = "white" if second else colour
                box: dict[str, Any] = {"boxstyle": "round,pad=0.25", "facecolor": face}
                box |= {"edgecolor": colour, "linestyle": line, "linewidth": 1.6}
                text = "white" if pair < half * 0.6 and not second else "black"
                axes.text(x, y, f"row {row}", color=text, bbox=box, **place)
        axes.set_xlim(0.4, 3.6)
        axes.set_ylim(head_dim - 0.3, -1.6)
        axes.axis("off")
        axes.text(1, -1.2, "half_split\n(Hugging Face)", ha="center", va="center", weight="bold")
        axes.text(
            3, -1.2, "interleaved\n(Meta, TorchTitan)", ha="center", va="center", weight="bold"
        )
        return picture(
            figure,
            f"Two columns of the {head_dim} rows of one head joined by lines: row i of the left half "
            f"goes to place 2i, row i + {half} to place 2i + 1, so that each pair becomes neighbours.",
            f"One head of {head_dim} rows. A pair has one colour; its second row is hollow and its "
            "line dashed. The converter moves rows, never numbers within a row.",
        )
