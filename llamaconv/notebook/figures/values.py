"""The values of one tensor, as a histogram."""

from __future__ import annotations

import numpy as np

from llamaconv.checkpoint.value_statistics import FAR, Histogram
from llamaconv.notebook.figures.picture import COLOURS, Picture, drawing, picture
from llamaconv.report.errors import printable


def histogram(found: Histogram) -> Picture:
    """Draw how often values occur, on a logarithmic scale, so that rare ones are seen."""
    edges = np.linspace(found.lowest, found.highest, len(found.counts) + 1)
    with drawing(7.4, 3.0) as (figure, axes):
        axes.bar(
            edges[:-1], found.counts, np.diff(edges), align="edge", color=COLOURS[0], edgecolor="w"
        )
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0)
        axes.set_xlim(found.lowest, found.highest)
        axes.set_xlabel("value")
        axes.set_ylabel("number of values")
        return picture(figure, _conclusion(found), _caption(found))


def _conclusion(found: Histogram) -> str:
    of = found.of
    name = printable(of.name)
    odd = [(of.n_nan, "NaN"), (of.n_infinite, "infinite"), (found.n_far, "far from the mean")]
    parts = [f"{count:,} {what}" for count, what in odd if count]
    if not of.n_finite:
        return f"{name} has no finite value: {', '.join(parts) or 'it is empty'}."
    if not of.deviation:
        return f"All finite values of {name} are {of.mean:.3g}."
    shape = "bell-shaped around" if _is_bell(found) else "not bell-shaped; their mean is"
    return (
        f"The {of.n_elements:,} values of {name} are {shape} {of.mean:.2g}, deviation "
        f"{of.deviation:.2g}; {', '.join(parts) or 'none is NaN, infinite or far from the mean'}."
    )


def _is_bell(found: Histogram) -> bool:
    """Return whether most values are within one deviation, and the highest bar is near the mean."""
    middles = np.linspace(found.lowest, found.highest, 2 * len(found.counts) + 1)[1::2]
    counts = np.array(found.counts)
    near = np.abs(middles - found.of.mean) <= found.of.deviation
    share = counts[near].sum() / max(1, counts.sum())
    return bool(near[counts.argmax()] and 0.55 < share < 0.85)


def _caption(found: Histogram) -> str:
    of = found.of
    return (
        f"From {of.minimum:.3g} to {of.maximum:.3g}; {of.n_zero:,} zeros, {of.n_zero_rows:,} rows of "
        f"zeros; {found.n_far:,} values are more than {FAR} deviations from the mean and not drawn."
    )
