"""Pictures from values, with words for those who cannot see them; the only user of matplotlib.

Every function returns a `Picture`: in a notebook a figure with its caption, elsewhere a PNG to
be saved. Colours are never alone: a marker or a hatch says the same.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from llamaconv.checks import Verification

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A PNG, the conclusion it shows in words (``alt``), and a caption under it."""

    png: bytes
    alt: str
    caption: str

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)

    def __repr__(self) -> str:
        return f"<Picture: {self.alt}>"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.png).decode()
        return (
            f'<figure><img alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}" '
            f'style="max-width:100%"><figcaption>{html.escape(self.caption)}</figcaption></figure>'
        )


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    with plt.style.context(["tableau-colorblind10", _STYLE]):
        figure, axes = plt.subplots(figsize=(width, height), dpi=110, layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _picture(figure: Any, alt: str, caption: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(buffer.getvalue(), alt, caption)


def head_layouts(head_dim: int = 16) -> Picture:
    """Where each row of one head goes between the two layouts; a line a row, a colour a pair."""
    half = head_dim // 2
    with _axes(6.4, 0.27 * head_dim + 1.0) as (figure, axes):
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
        return _picture(
            figure,
            f"Two columns of the {head_dim} rows of one head joined by lines: row i of the left half "
            f"goes to place 2i, row i + {half} to place 2i + 1, so that each pair becomes neighbours.",
            f"One head of {head_dim} rows. A pair has one colour; its second row is hollow and its "
            "line dashed. The converter moves rows, never numbers within a row.",
        )


def score_errors(verification: Verification) -> Picture:
    """The rotated-score error of each layer, and the same done wrong, on a logarithmic scale."""
    errors = [max(error, 1e-9) for error, _ in verification.layers]
    wrong = [max(yardstick, 1e-9) for _, yardstick in verification.layers]
    layers = range(len(errors))
    with _axes(6.4, 3.0) as (figure, axes):
        axes.semilogy(layers, wrong, "s--", label="done wrong: rows left in the other layout")
        axes.semilogy(layers, errors, "o-", label="this conversion")
        axes.set_xlabel("layer")
        axes.set_ylabel("largest difference of\nrotated scores, relative")
        axes.set_ylim(1e-9, 30)
        axes.set_xticks(list(layers) if len(errors) <= 16 else list(layers)[:: len(errors) // 8])
        axes.legend(loc="center right", frameon=False)
        worst = max(errors, default=0.0)
        least = min(wrong, default=0.0)
        return _picture(
            figure,
            f"In every layer the conversion's scores agree with the source's to better than "
            f"{_power_above(worst)}, while rows left in the other layout are off by {least:.1g} or more.",
            "Attention scores with the rotation of each layout, at distances above 0. "
            "Below 0.0001 is rounding.",
        )


def _power_above(value: float) -> str:
    """The power of ten just above, so that the words do not depend on the last bits."""
    power = 1e-9
    while power < value:
        power *= 10
    return f"{power:.0e}"
