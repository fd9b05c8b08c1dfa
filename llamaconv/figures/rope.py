"""RoPE's pairs as pictures: how they turn, who is whose partner, where a row goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.patches import Arc, Circle, Rectangle

from llamaconv.figures.picture import Picture, drawing, picture

if TYPE_CHECKING:
    from llamaconv.lesson import TurnedPairs

# Followed rows and their partners; both from the colour-blind safe cycle of tableau.
_FOLLOWED, _PARTNER = "#C85200", "#006BA4"


def turning(turned: TurnedPairs, position: int | None = None) -> Picture:
    """Each pair as a point that turns from position 0 to ``position``, the last one by default."""
    last = len(turned.points) - 1 if position is None else position
    colours = plt.get_cmap("viridis")
    columns = len(turned.pairs)
    with drawing(2.4 * columns, 2.95, columns=columns, squeeze=False) as (figure, axes):
        for at, (pair, speed) in enumerate(zip(turned.pairs, turned.per_position, strict=True)):
            one = axes[0, at]
            points = (turned.points[: last + 1, at] / turned.points[0, at].norm()).tolist()
            one.add_patch(Circle((0, 0), 1, fill=False, color="0.8"))
            one.plot([0, points[0][0]], [0, points[0][1]], ":", color="0.6", linewidth=1)
            one.plot([0, points[-1][0]], [0, points[-1][1]], color="0.3", linewidth=1)
            for number, (x, y) in enumerate(points):
                colour = colours(number / max(1, last) * 0.9)
                one.plot(x, y, "o", markersize=7, color=colour)
                # Where points lie closer than their numbers are wide, the ends say enough.
                if number in (0, last) or (speed > 0.25 and number * speed < 6.2):
                    one.text(1.24 * x, 1.24 * y, number, ha="center", va="center", fontsize=9)
            half = turned.head_dim // 2
            words = f"pair {pair}: rows {pair}, {pair + half}\n{speed:.2g} rad a position"
            one.text(0, 1.55, words, ha="center", va="bottom")
            one.set(xlim=(-1.45, 1.45), ylim=(-1.4, 2.15), aspect="equal")
            one.axis("off")
        fastest, slowest = (abs(turned.per_position[end]) * last for end in (0, -1))
        return picture(
            figure,
            f"Points on circles, one circle a pair, numbered by position from 0 to {last}: pair "
            f"{turned.pairs[0]} has turned by {fastest:.2g} radians, pair {turned.pairs[-1]} by "
            f"{slowest:.2g}; none has changed its length.",
            "q of head 0 for one token, put at later and later positions. Each pair of rows is one "
            "point, at its own speed; the number is the position.",
        )


def pairings(head_dim: int = 16) -> Picture:
    """Which row is whose partner, in both layouts: rows on a line, an arc a pair."""
    half = head_dim // 2
    layouts: Sequence[tuple[str, list[tuple[int, int]]]] = (
        ("half_split: row i and row i + head_dim/2", [(i, i + half) for i in range(half)]),
        ("interleaved: row 2i and row 2i + 1", [(2 * i, 2 * i + 1) for i in range(half)]),
    )
    colours = plt.get_cmap("viridis")
    with drawing(7.2, 3.9, 2, gridspec_kw={"height_ratios": (2.3, 1)}) as (figure, axes):
        for one, (name, pairs) in zip(axes, layouts, strict=True):
            for pair, (first, second) in enumerate(pairs):
                colour = colours(pair / max(1, half - 1) * 0.9)
                wide = second - first
                tall = 4.6 if wide > 1 else 1.3
                # Arcs that cross would hide each other at one height.
                tall += 0.35 * pair if wide > 1 else 0
                centre = ((first + second) / 2, 0.55)
                arc = Arc(centre, wide, tall, theta1=0, theta2=180, color=colour, linewidth=2)
                one.add_patch(arc)
                for row, hollow in ((first, False), (second, True)):
                    _cell(one, row, 0, row, colour, hollow, pair < half * 0.6)
            one.set_title(name, loc="left", fontsize=10, weight="bold")
            one.set(xlim=(-0.7, head_dim - 0.3), aspect="equal")
            one.set_ylim(-0.6, 0.7 + (4.6 + 0.35 * half) / 2 if pairs[0][1] > 1 else 1.4)
            one.axis("off")
        return picture(
            figure,
            f"Rows 0 to {head_dim - 1} of one head on a line, twice. half_split: arcs of equal width "
            f"join row i to row i + {half}. interleaved: short arcs join neighbours 2i and 2i + 1.",
            f"One head of {head_dim} rows. An arc joins partners: the two rows that RoPE turns "
            "together. The second row of a pair is hollow; numbers are places in the matrix.",
        )


def follow_row(row: int = 17, head_dim: int = 32) -> Picture:
    """Where ``row`` of one head and its partner go, among all others: a strip a layout."""
    half = head_dim // 2
    partner = (row + half) % head_dim
    places = {one: 2 * (one % half) + one // half for one in range(head_dim)}
    with drawing(0.3 * head_dim + 0.8, 3.1) as (figure, axes):
        for one, place in places.items():
            colour, wide, above = "0.82", 1.0, 1
            if one in (row, partner):
                colour, wide, above = (_FOLLOWED if one == row else _PARTNER), 2.6, 3
            line = "--" if one == partner else "-"
            axes.plot([one, place], [0.7, 3.3], line, color=colour, linewidth=wide, zorder=above)
        for y, shown in ((0.0, {one: one for one in places}), (4.0, places)):
            for one, x in shown.items():
                if one in (row, partner):
                    colour = _FOLLOWED if one == row else _PARTNER
                    _cell(axes, x, y, one, colour, one == partner, True, width=0.95)
                else:
                    _cell(axes, x, y, one, "0.7", True, False, width=0.95)
        for height, name in (
            (-1.1, "half_split (Hugging Face)"),
            (5.1, "interleaved (Meta, TorchTitan)"),
        ):
            axes.text(-0.5, height, name, ha="left", va="center", weight="bold")
        end = {"x": head_dim - 0.5, "y": 5.1, "ha": "right", "va": "center", "fontsize": 10}
        axes.text(s=f"row {row} goes to place {places[row]}", color=_FOLLOWED, **end)
        axes.set(xlim=(-0.8, head_dim - 0.2), ylim=(5.8, -1.8))
        axes.axis("off")
        return picture(
            figure,
            f"Two strips of the {head_dim} rows of one head: row {row} goes from place {row} to place "
            f"{places[row]}, its partner, row {partner}, from place {partner} to {places[partner]}, "
            "beside it.",
            f"Row {row} (solid) and its partner, row {partner} (dashed). The number is the row's place "
            "in half_split; only places change, no number within a row.",
        )


def _cell(
    axes: Any,
    x: float,
    y: float,
    row: int,
    colour: Any,
    hollow: bool,
    dark: bool,
    width: float = 0.9,
) -> None:
    """One row as a small box with its number."""
    face = "white" if hollow else colour
    box = Rectangle(
        (x - width / 2, y - 0.45),
        width,
        0.9,
        facecolor=face,
        edgecolor=colour,
        linewidth=1.6,
        zorder=4,
    )
    axes.add_patch(box)
    text = "white" if dark and not hollow else "black"
    axes.text(x, y, row, ha="center", va="center", fontsize=9, color=text, zorder=5)
