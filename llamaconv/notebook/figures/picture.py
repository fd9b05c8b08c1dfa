"""A picture with a text alternative, which every function of `figures` returns.

The ground is transparent, and every colour has a contrast of 3 or more with white and with the
darkest theme, so one file serves both. Colours never carry meaning alone: a marker, a hatch or a
dash says the same. What is right is `RIGHT` and what is wrong is `WRONG`, by what was done and not
by how well it went; nothing else has these two colours.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

# Close to Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart.
RIGHT, WRONG = "#107DC0", "#D55E00"
# Text, axes and whatever is neither right nor wrong.
INK = "#7A7A7A"
# Kinds of things, such as the pairs of a head. Neighbours differ in more than their hue's name.
COLOURS = (
    "#8168BE",
    "#867D00",
    "#00927D",
    "#AF578C",
    "#4D8C3E",
    "#9C5EAA",
    "#008F9F",
    "#BB565A",
)
# The grounds of the two themes of JupyterLab.
GROUNDS = ("#FFFFFF", "#111111")
# Signed numbers, centred on white: purple and green.
SIGNED = "PRGn"

# One marker and one dash per line, so that lines can be told apart without colour.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 3)))

# Pixels per inch of the file, and of the page that shows it: sharp at 200 % zoom.
DPI, _SHOWN_DPI = 220, 110
# With a palette a file is a quarter as large, and lines and maps look the same.
_PALETTE = 96

_STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook shows as a figure with a caption.

    Attributes:
        png: The picture as a PNG file.
        alt: What it shows, in words: the conclusion, for readers who cannot see it.
        caption: The text below it.
    """

    png: bytes
    alt: str
    caption: str

    def save(self, path: str | Path) -> None:
        """Write the PNG to ``path``."""
        Path(path).write_bytes(self.png)

    def __repr__(self) -> str:
        return f"<Picture: {self.alt}>"

    @property
    def width(self) -> int:
        """The width at which a page shows the picture, in pixels: half that of the file."""
        return int.from_bytes(self.png[16:20], "big") * _SHOWN_DPI // DPI

    def _repr_html_(self) -> str:
        # In a narrow window, or at 200 % zoom, it scrolls before its labels get too small to read.
        return (
            f'<figure style="margin:0;overflow-x:auto"><img alt="{html.escape(self.alt)}" width="{self.width}" '
            f'src="data:image/png;base64,{self._base64()}" style="max-width:max(100%,40rem);height:auto">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the figure, and the picture by itself for viewers that show no HTML."""
        data = {
            "text/html": self._repr_html_(),
            "image/png": self._base64(),
            "text/plain": repr(self),
        }
        return data, {"image/png": {"alt": self.alt, "width": self.width}}

    def _base64(self) -> str:
        return base64.b64encode(self.png).decode()


@contextmanager
def drawing(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, as ``plt.subplots`` gives them.

    Args:
        width: Width in inches.
        height: Height in inches.
        rows: Rows of axes.
        columns: Columns of axes.
        options: Passed to ``plt.subplots``.
    """
    with plt.style.context(["default", _STYLE]):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), dpi=DPI, layout="constrained", **options
        )
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def picture(figure: Any, alt: str, caption: str) -> Picture:
    """Return ``figure`` as a `Picture`; the same figure gives the same bytes."""
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
    buffer = io.BytesIO()
    drawn.quantize(_PALETTE, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return Picture(buffer.getvalue(), alt, caption)


def run_look(number: int) -> dict[str, Any]:
    """Return colour, dash and marker of a line: run 0 is the right one, all others are wrong."""
    return {
        "color": WRONG if number else RIGHT,
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 6 if number else 7,
        "linewidth": 1.5 if number else 2.4,
        "zorder": 2 if number else 3,
    }


def bar_look(wrong: bool) -> dict[str, Any]:
    """Return colour and hatch of an area that is right or wrong."""
    return {
        "facecolor": WRONG if wrong else RIGHT,
        "hatch": "//" if wrong else "",
        "edgecolor": "white" if wrong else RIGHT,
        "linewidth": 0,
    }


def label_ends(axes: Any, labels: Sequence[str]) -> None:
    """Write the label of each line next to its last point, where labels do not overlap.

    Args:
        axes: Axes with one line per label, with their final limits.
        labels: The labels, in the order of the lines.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [_end(line.get_xydata()) for line in axes.lines[: len(labels)]]
    heights = [float(to_axes.transform(end)[1]) for end in ends]
    right = max(float(to_axes.transform(end)[0]) for end in ends)
    # The height of a line of text, as a share of the axes: all but the labels of the x axis.
    line = 1.25 * plt.rcParams["font.size"] / (72 * axes.figure.get_figheight() - 46)
    for at, y in zip(_by_height(heights), _spread(sorted(heights), line), strict=True):
        axes.annotate(
            labels[at],
            ends[at],
            (right + 0.05, y),
            textcoords="axes fraction",
            color=axes.lines[at].get_color(),
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": axes.lines[at].get_color(),
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def _end(points: Any) -> tuple[float, float]:
    """Return the last point that can be drawn."""
    finite = points[np.isfinite(points).all(axis=1)]
    return tuple(finite[-1]) if len(finite) else (points[-1][0], 1.0)


def _by_height(heights: list[float]) -> list[int]:
    return sorted(range(len(heights)), key=heights.__getitem__)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move sorted numbers apart until each is ``gap`` above the one before it, and none below 0."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        # Groups that touch become one, centred on the mean of what it has.
        while len(groups) > 1 and _edge(groups[-2], gap, 1) + gap > _edge(groups[-1], gap, -1):
            last = groups.pop()
            groups[-1] += last
    spread = [_edge(group, gap, -1) + gap * at for group in groups for at in range(len(group))]
    return [max(height, gap * at) for at, height in enumerate(spread)]


def _edge(group: list[float], gap: float, side: int) -> float:
    return sum(group) / len(group) + side * gap * (len(group) - 1) / 2


def doubling(length: int) -> list[tuple[int, int]]:
    """Split 0 to ``length`` into half-open ranges that double, such as (0, 1), (1, 2), (2, 4).

    One axis then shows what matters early and what matters late.
    """
    edges = [0, *(2**power for power in range(32) if 2**power < length), length]
    return list(itertools.pairwise(edges))
