"""What differs between two checkpoints, as a picture over layers and roles."""

from __future__ import annotations

from math import isfinite, log10
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm

from llamaconv.model.names import ROLES
from llamaconv.notebook.figures.picture import INK, Picture, drawing, picture
from llamaconv.report.errors import printable
from llamaconv.verify.compared import Compared, Pair

# With more layers, numbers in the cells would be too small.
_MOST_NUMBERED = 8
# Markers and their sizes: no difference, and one that is not a number.
_SIGNS = {".": 3, "x": 6}
_CAPTION = (
    "Norm of the difference, divided by the norm of the first checkpoint's tensor. A dot is a "
    "tensor without a difference, a cross one that could not be compared."
)


def differences(compared: Compared) -> Picture:
    """Draw the relative difference of each role in each layer, on a logarithmic scale."""
    known = {(pair.role, pair.layer): pair for pair in compared.pairs if pair.role}
    roles = [role for role in ROLES if any(place[0] == role for place in known)]
    layers = sorted({layer for _, layer in known if layer is not None})
    # Tensors outside the layers have a column of their own, on the left.
    columns: list[int | None] = [None, *layers]
    values = [pair.relative for pair in known.values() if isfinite(pair.relative) and pair.relative]
    least, most = min(values, default=1e-6), max(values, default=1.0)
    norm = LogNorm(10 ** _floor(least), max(10 ** (_floor(most) + 1), 10 ** (_floor(least) + 1)))
    with drawing(min(11.0, 3.4 + 0.62 * len(columns)), 1.5 + 0.36 * len(roles)) as (figure, axes):
        shown = np.full((len(roles), len(columns)), np.nan)
        marked: dict[str, list[tuple[int, int]]] = {sign: [] for sign in _SIGNS}
        for row, role in enumerate(roles):
            for column, layer in enumerate(columns):
                if (pair := known.get((role, layer))) is None:
                    continue
                shown[row, column] = pair.relative or np.nan
                if sign := _sign(pair):
                    marked[sign].append((column, row))
                elif len(columns) <= _MOST_NUMBERED + 1:
                    _number(axes, column, row, pair.relative, norm)
        # One call per sign: of a 405B, a call per cell takes seconds.
        for sign, places in marked.items():
            xs, ys = [x for x, _ in places], [y for _, y in places]
            axes.plot(xs, ys, sign, color=INK, markersize=_SIGNS[sign], linestyle="none")
        shown[np.isinf(shown)] = norm.vmax
        image = axes.imshow(shown, norm=norm, cmap="cividis", aspect="auto")
        axes.set_yticks(range(len(roles)), roles)
        step = max(1, len(layers) // 16)
        ticks = [0, *range(1, len(columns), step)]
        axes.set_xticks(ticks, ["—", *(str(columns[at]) for at in ticks[1:])])
        axes.set_xlabel("layer (—: outside the layers)")
        figure.colorbar(image, ax=axes, label="relative difference")
        return picture(figure, _conclusion(compared), _CAPTION)


def _floor(value: float) -> int:
    return int(np.floor(log10(value)))


def _sign(pair: Pair) -> str:
    """Return the marker that says what a cell is without colour; empty for a number."""
    if not pair.differs:
        return "."
    return "x" if pair.reason or not isfinite(pair.relative) else ""


def _number(axes: Any, x: int, y: int, relative: float, norm: LogNorm) -> None:
    """Write a number into its cell, in black or white."""
    red, green, blue, _ = colormaps["cividis"](float(norm(relative or 1e-30)))
    ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
    axes.text(x, y, f"{relative:.0e}", ha="center", va="center", color=ink, fontsize=9)


def _conclusion(compared: Compared) -> str:
    different = compared.different
    if not different:
        return f"No value differs: all {len(compared.pairs)} tensors are equal in both checkpoints."
    worst = different[0]
    by = worst.reason or (
        f"relative difference {worst.relative:.2g}" if isfinite(worst.relative) else "not finite"
    )
    share = f"{len(different)} of {len(compared.pairs)} tensors differ"
    return printable(f"{share}. The largest difference is in {worst.names[0]} ({by}).")
