"""Square maps side by side on one pair of axes, with one scale.

An axes a map would be the usual way; one for all is drawn three times as fast, and these
pictures are drawn at each change of a control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle


def tiles(
    axes: Any, maps: Mapping[str, Any], columns: int, labels: tuple[str, str], **look: Any
) -> Any:
    """Draws ``maps``, numpy arrays of one size by their titles; ``look`` is imshow's.

    ``labels`` are those of the two axes. Returns the last image, for a colour bar.
    """
    size = len(next(iter(maps.values())))
    gap_x, gap_y = 0.1 * size, 0.32 * size
    rows = -(-len(maps) // columns)
    for at, (title, values) in enumerate(maps.items()):
        x, y = at % columns * (size + gap_x), at // columns * (size + gap_y)
        drawn = axes.imshow(values, extent=(x, x + size, y + size, y), **look)
        axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor="0.3", linewidth=0.8))
        axes.text(x + size / 2, y - 0.03 * size, title, ha="center", va="bottom")
    step = 10 if size > 12 else 2
    ticks = np.arange(0, size, step)
    for set_ticks, count, stride in (
        (axes.set_xticks, columns, size + gap_x),
        (axes.set_yticks, rows, size + gap_y),
    ):
        places = [at * stride + tick + 0.5 for at in range(count) for tick in ticks]
        set_ticks(places, [str(tick) for _ in range(count) for tick in ticks], fontsize=9)
    axes.set_xlim(0, columns * (size + gap_x) - gap_x)
    axes.set_ylim(rows * (size + gap_y) - gap_y, -0.2 * size)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return drawn
