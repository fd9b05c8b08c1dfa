"""Attention scores right and wrong, and how the error grows with distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from llamaconv.figures.picture import MARKERS, Picture, doubling, drawing, picture
from llamaconv.figures.tiles import tiles

if TYPE_CHECKING:
    from llamaconv.lesson import Agreement, ScoreErrors


def score_maps(agreement: Agreement) -> Picture:
    """Scores of one head three times on one scale, and the error of the third."""
    split, woven, wrong = agreement.maps
    largest = max(one.tril().abs().max().item() for one in agreement.maps)
    # The future is masked before the softmax; it is grey, so that white is zero only.
    future = np.triu(np.ones(split.shape), 1) > 0
    maps = {
        "half_split rows,\nits own rotation": split,
        "interleaved rows,\nits own rotation": woven,
        "half_split rows,\ninterleaved rotation": wrong,
        "error of the third\n(third − first)": wrong - split,
    }
    past = {title: np.ma.masked_where(future, one.numpy()) for title, one in maps.items()}
    with drawing(10.4, 3.3) as (figure, axes):
        colours = plt.get_cmap("PuOr").with_extremes(bad="0.88")
        labels = ("position of k", "position of q")
        shown = tiles(axes, past, 4, labels, cmap=colours, vmin=-largest, vmax=largest)
        figure.colorbar(shown, ax=axes, shrink=0.8, label="score")
        on_diagonal = (wrong - split).diagonal().abs().max().item() < 1e-4 * largest
        return picture(
            figure,
            "Four maps of attention scores, query against key positions. The first two are alike, the "
            "third is not, and the fourth shows its error: "
            + ("zero on the diagonal, " if on_diagonal else "")
            + f"up to {_percent((wrong - split).tril().abs().max().item() / largest)} of the largest score.",
            f"Layer 0, head {agreement.head}, before the softmax; one colour scale for all. White is zero, "
            "grey the future, which no query sees.",
        )


def error_by_distance(errors: ScoreErrors, ways: tuple[str, ...] | None = None) -> Picture:
    """The error of the scores by distance, a line a way of re-ordering, all of them by default."""
    names = ways or tuple(errors.by_way)
    groups = doubling(errors.n_distances)
    labels = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in groups]
    found = {
        name: [errors.by_way[name][a:b].square().mean().sqrt().item() for a, b in groups]
        for name in names
    }
    with drawing(7.8, 3.5) as (figure, axes):
        for number, name in enumerate(errors.by_way):
            # Colour and marker belong to the way, whichever others are shown.
            if name in found:
                look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}"}
                axes.plot(found[name], markersize=7, linewidth=1.6, label=name, **look)
        axes.set_xticks(range(len(labels)), labels, fontsize=9)
        axes.set_xlabel("distance between query and key, positions")
        axes.set_ylabel("error of the scores,\nrelative")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        first, last = (
            ", ".join(f"{name} {values[at]:.1f}" for name, values in found.items())
            for at in (0, -1)
        )
        return picture(
            figure,
            f"Error of the scores by distance, a line a way. At distance 0: {first}. At distances "
            f"{labels[-1]}: {last}.",
            "Root mean square over all heads of layer 0, in units of the right scores' own; 1 is an "
            "error as large as the scores.",
        )


def _percent(share: float) -> str:
    """To the next ten percent, so that the words do not depend on the last bits."""
    return f"{round(share * 10) * 10}%"
