"""A picture and the words for those who cannot see it: what every function of `figures` returns.

In a notebook a figure with its caption, elsewhere a PNG to be saved. Colours are never alone: a
marker, a hatch or a dash says the same. The figure is white in every theme, so that its colours
mean the same; the caption takes the theme's.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}

# A marker beside each colour of the cycle, so that lines are told apart without it.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
def drawing(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure of inches ``width`` × ``height`` and its axes, as ``plt.subplots`` gives them."""
    with plt.style.context(["tableau-colorblind10", _STYLE]):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), dpi=110, layout="constrained", **options
        )
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def picture(figure: Any, alt: str, caption: str) -> Picture:
    """``figure`` drawn; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(buffer.getvalue(), alt, caption)


def doubling(length: int) -> list[tuple[int, int]]:
    """Groups of 0 to ``length`` that double: ``(0, 1), (1, 2), (2, 4), (4, 8), …``, ends excluded.

    What matters early and late is then seen on one axis.
    """
    edges = [0, *(2**power for power in range(32) if 2**power < length), length]
    return list(itertools.pairwise(edges))
