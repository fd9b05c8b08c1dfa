"""Attention scores and attention maps, right and wrong, and how the error grows with distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize, to_rgba
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from llamaconv.notebook.figures.picture import (
    INK,
    RIGHT,
    SIGNED,
    WRONG,
    Picture,
    doubling,
    drawing,
    label_ends,
    picture,
    run_look,
)
from llamaconv.notebook.figures.rope import FOLLOWED

if TYPE_CHECKING:
    from llamaconv.notebook.lesson import Agreement, AttentionMaps, Projection, ScoreErrors

# A smaller difference, relative to the largest score, is the rounding of float32 sums.
_ROUNDING = 1e-4
# The rows of a head that are drawn; the positions, and characters of a label, with room at a map.
_MOST_ROWS, _MOST_LABELLED, _LABEL = 16, 14, 8


def projection(found: Projection) -> Picture:
    """Draw a head of W_q as rows of numbers, its input above and q beside it; one row is lit."""
    rows, x, q = found.rows.numpy(), found.x.numpy(), found.q.numpy()
    count, width = rows.shape
    # Heads of many rows: those around the row that is lit.
    first = max(0, min(found.row - _MOST_ROWS // 2, count - _MOST_ROWS))
    shown = slice(first, first + _MOST_ROWS)
    lit, tall = found.row - first, len(rows[shown])
    with drawing(7.4, 0.2 * tall + 1.6) as (figure, axes):
        for values, left, right, top, dim in (
            (x[None], 0, 80, -3.2, False),
            (rows[shown], 0, 80, 0, True),
            (q[shown, None], 88, 92, 0, True),
        ):
            # A few numbers of a trained model are many times as large as the others.
            most = float(np.quantile(np.abs(values), 0.99)) or 1.0
            shades = plt.get_cmap(SIGNED)(Normalize(-most, most)(values))
            if dim:
                # Mixed with grey and opaque, so that the rest looks the same on both grounds.
                rest = np.arange(len(values)) != lit
                shades[rest] = 0.4 * shades[rest] + 0.6 * np.array(to_rgba(INK))
            axes.imshow(shades, extent=(left, right, top + len(values), top), aspect="auto")
            box = Rectangle((left, top + dim * lit), right - left, 1, fill=False, zorder=4)
            box.set(edgecolor=FOLLOWED, linewidth=2.6)
            axes.add_patch(box)
        name = {"ha": "left", "va": "bottom", "weight": "bold"}
        axes.text(0, -3.4, f"x: the input of the layer, {width} numbers", **name)
        axes.text(0, -0.2, f"W_q, head 0: {count} rows of {width} numbers", **name)
        axes.text(88, -0.2, "q", **name)
        lit_look = {"va": "center", "color": FOLLOWED, "weight": "bold"}
        axes.text(84, lit + 0.5, "· x  =", ha="center", **lit_look)
        axes.text(93, lit + 0.5, f"{q[found.row] + 0.0:.2f}", **lit_look)
        ticks = sorted({0, tall - 1, lit})
        axes.set_yticks([at + 0.5 for at in ticks], [f"row {first + at}" for at in ticks])
        axes.set(xlim=(-0.5, 101), ylim=(tall + 0.2, -5.2), xticks=[])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        part = "" if tall == count else f" Rows {first} to {first + tall - 1} are drawn."
        return picture(
            figure,
            f"The rows of W_q as strips of colour, the input x above them, q at their side. Number "
            f"{found.row} of q, {q[found.row] + 0.0:.2f}, is row {found.row} of W_q times x: "
            f"{width} products, summed. No other row has a part in it.",
            f"Number {found.row} of q is row {found.row} of W_q times x, number by number, summed. "
            f"Green is above zero, purple below, white is zero.{part}",
        )


def score_maps(agreement: Agreement) -> Picture:
    """Draw the scores of one head three times on one scale, and the error of the third."""
    split, woven, wrong = agreement.maps
    largest = max(one.tril().abs().max().item() for one in agreement.maps)
    # The softmax masks the future; it is grey, so that white always means zero.
    future = np.triu(np.ones(split.shape), 1) > 0
    maps = {
        "✓ half_split rows,\nown rotation": split,
        "✓ interleaved rows,\nown rotation": woven,
        "✗ half_split rows,\ninterleaved rotation": wrong,
        "error: the third\nminus the first": wrong - split,
    }
    past = {title: np.ma.masked_where(future, one.numpy()) for title, one in maps.items()}
    with drawing(6.6, 6.2) as (figure, axes):
        colours = plt.get_cmap(SIGNED).with_extremes(bad=to_rgba(INK, 0.4))
        labels = ("position of k", "position of q")
        look: dict[str, Any] = {"cmap": colours, "vmin": -largest, "vmax": largest}
        shown = _tiles(axes, past, 2, labels, (RIGHT, RIGHT, WRONG, INK), **look)
        figure.colorbar(shown, ax=axes, shrink=0.5, label="score")
        alike = (woven - split).tril().abs().max().item() < _ROUNDING * largest
        on_diagonal = (wrong - split).diagonal().abs().max().item() < _ROUNDING * largest
        error = (wrong - split).tril().abs().max().item() / largest
        return picture(
            figure,
            "Four maps of attention scores, query by key position. The first two are "
            f"{'alike' if alike else 'not alike'}. The third is that of the wrong rotation, and "
            f"the fourth is its error: {'zero on the diagonal, ' if on_diagonal else ''}"
            f"up to {_rounded(error, 10)} of the largest score.",
            f"Layer 0, head {agreement.head}, before the softmax, all on one colour scale. White "
            "is zero; grey is the future, which no query sees.",
        )


def error_by_distance(errors: ScoreErrors, variants: tuple[str, ...] | None = None) -> Picture:
    """Draw the error of the scores by distance: one line per variant, by default all of them."""
    groups = doubling(errors.n_distances)
    labels = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in groups]
    found = {
        name: [errors.by_variant[name][a:b].square().mean().sqrt().item() for a, b in groups]
        for name in variants or tuple(errors.by_variant)
    }
    with drawing(7.6, 3.7) as (figure, axes):
        for number, name in enumerate(errors.by_variant):
            # A variant keeps its dash and marker, whichever others are shown.
            if name in found:
                axes.plot(found[name], **run_look(number))
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(-0.03, 1.08 * max(1.0, *map(max, found.values())))
        axes.set_xlabel("distance between query and key, positions")
        axes.set_ylabel("error of the scores,\nrelative")
        label_ends(axes, [name for name in errors.by_variant if name in found])
        first, last = (
            ", ".join(f"{name} {values[at] + 0.0:.1f}" for name, values in found.items())
            for at in (0, -1)
        )
        return picture(
            figure,
            f"Error of the scores by distance, one line per variant. At distance 0: {first}. At "
            f"distances {labels[-1]}: {last}.",
            "Root mean square over all heads of layer 0, in units of the right scores' own. At 1 "
            "the error is as large as the scores.",
        )


def attention_maps(maps: AttentionMaps) -> Picture:
    """Draw where each position of the excerpt looks: one map per variant.

    With ``maps.labels``, the first positions are drawn, named by their bytes or tokens.
    """
    columns = 3
    rows = -(-len(maps.by_variant) // columns)
    length = len(next(iter(maps.by_variant.values())))
    names = maps.labels
    most = min(length, _MOST_LABELLED) if names else length
    titled = {}
    for name, found in maps.by_variant.items():
        share = maps.moved.get(name)
        note = f"\n{_rounded(share, 20)} moved" if share is not None else "\n"
        mark = "✓" if share is None else "✗"
        # A row of a causal map needs no later position, so a part from the start is whole.
        titled[f"{mark} {name}{note}"] = found[:most, :most].numpy()
    with drawing(7.6, 2.6 * rows + 0.5) as (figure, axes):
        labels = (f"{maps.unit} looked at", f"{maps.unit} that looks")
        colours = [WRONG if name in maps.moved else RIGHT for name in maps.by_variant]
        look: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1, "ticks": names[:most]}
        drawn = _tiles(axes, titled, columns, labels, colours, **look)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.6, label="attention probability")
        bar.outline.set_edgecolor(INK)
        shares = maps.moved.values()
        part = f"the first {most} of {length}" if most < length else str(length)
        return picture(
            figure,
            f"Attention maps of layer {maps.layer}, head {maps.head}, one per variant: the wrong "
            f"variants move {_rounded(min(shares), 20)} to {_rounded(max(shares), 20)} of the "
            "attention to other positions than the right one's.",
            f"Layer {maps.layer}, head {maps.head}, on {part} {maps.unit}s of the text. Each row "
            f"of a map sums to 1. Moved: the share that goes elsewhere than in the right map, mean over "
            f"all {length}.",
        )


def _rounded(share: float, steps: int) -> str:
    """Return a percentage in ``steps`` steps, so that the text does not depend on the last bits."""
    return f"{round(share * steps) * (100 // steps)}%"


def _tiles(
    axes: Any,
    maps: Mapping[str, Any],
    columns: int,
    labels: tuple[str, str],
    colours: Sequence[str],
    ticks: Sequence[str] = (),
    **look: Any,
) -> Any:
    """Draw square maps side by side on one pair of axes, with one scale.

    One pair of axes per map would be usual, but takes three times as long, and these pictures are
    drawn at each change of a control.

    Args:
        axes: Where to draw.
        maps: Square numpy arrays of one size, by title.
        columns: Maps per row.
        labels: The labels of the x and the y axis.
        colours: The colour of each title.
        ticks: The name of each position; without them, some have their numbers.
        look: Passed to ``imshow``.

    Returns:
        The last image, for a colour bar.
    """
    size = len(next(iter(maps.values())))
    gap_x, gap_y = 0.1 * size, 0.3 * size
    rows = -(-len(maps) // columns)
    for at, ((title, values), colour) in enumerate(zip(maps.items(), colours, strict=True)):
        x, y = at % columns * (size + gap_x), at // columns * (size + gap_y)
        drawn = axes.imshow(values, extent=(x, x + size, y + size, y), **look)
        frame = Rectangle((x, y), size, size, fill=False, edgecolor=colour, linewidth=1.2)
        axes.add_patch(frame)
        place = {"ha": "center", "va": "bottom", "fontsize": 10, "color": colour}
        axes.text(x + size / 2, y - 0.03 * size, title, **place)
    named = [(at, _short(name)) for at, name in enumerate(ticks)]
    if not named:
        named = [(at, str(at)) for at in range(0, size, 10 if size > 12 else 2)]
    for set_ticks, count, stride in (
        (axes.set_xticks, columns, size + gap_x),
        (axes.set_yticks, rows, size + gap_y),
    ):
        places = [at * stride + tick + 0.5 for at in range(count) for tick, _ in named]
        set_ticks(places, [text for _ in range(count) for _, text in named])
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a byte may be $
    if any(len(text) > 2 for _, text in named) and ticks:
        axes.tick_params("x", rotation=90)
    axes.tick_params(length=0 if ticks else 3)
    axes.set_xlim(0, columns * (size + gap_x) - gap_x)
    axes.set_ylim(rows * (size + gap_y) - gap_y, -0.2 * size)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return drawn


@cache
def _glyphs() -> frozenset[int]:
    """Return the characters that the font of the pictures has."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _short(name: str) -> str:
    """Return a few characters of a label, all of which can be drawn."""
    name = "".join(character if ord(character) in _glyphs() else "?" for character in name)
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
