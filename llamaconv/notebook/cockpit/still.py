"""The cockpit as a picture, for places that run no scripts: right beside wrong, as SVG.

Transparent like all pictures, in colours that can be read in both themes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaconv.model.names import Layout
from llamaconv.notebook.cockpit.small_head import SmallHead
from llamaconv.notebook.figures.picture import COLOURS, INK, RIGHT, WRONG

_CELL, _TOP, _WIDTH, _HEIGHT = 52, 118, 432, 260


@dataclass(frozen=True)
class Start:
    """What the cockpit shows first.

    Attributes:
        rows: The order of the rows.
        rotation: The layout of the rotation.
        position: The position of k.
        distance: The distance from k to q.
    """

    rows: Layout = "half_split"
    rotation: Layout = "interleaved"
    position: int = 2
    distance: int = 3


def number(value: float, digits: int) -> str:
    """Return ``value`` with so many decimals and a true minus sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def still(head: SmallHead, start: Start) -> str:
    """Draw the rows with their own rotation, and next to them what the cockpit starts with."""
    right = _panel(head, start.rows, start.rows, start)
    wrong = _panel(head, start.rows, start.rotation, start)
    width = 2 * _WIDTH + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" font-family="sans-serif" font-size="14" '
        f'text-anchor="middle" fill="{INK}">{right}<g transform="translate({_WIDTH + 24} 0)">{wrong}</g></svg>'
    )


def joined_rows(rows: Layout, rotation: Layout, half: int) -> list[tuple[int, int, int, int]]:
    """Return for each pair of the rotation its two places, and the two rows at these places.

    Rows are numbered as in half_split: row i and row i + ``half`` are partners.
    """
    order, places = _row_at(rows, half), range(half)
    pairs = [(i, i + half) if rotation == "half_split" else (2 * i, 2 * i + 1) for i in places]
    return [(first, second, order[first], order[second]) for first, second in pairs]


def _row_at(rows: Layout, half: int) -> list[int]:
    if rows == "half_split":
        return list(range(2 * half))
    return [row for pair in range(half) for row in (pair, pair + half)]


def _panel(head: SmallHead, rows: Layout, rotation: Layout, start: Start) -> str:
    half, centre = len(head.speeds), _WIDTH / 2
    colour, answer, dash = (
        (RIGHT, "✓ right: the rotation joins partners", "")
        if rows == rotation
        else (WRONG, "✗ wrong: the rotation joins strangers", ' stroke-dasharray="7 4"')
    )
    parts = [
        _text(centre, 20, f"{rows} rows, {rotation} rotation", ' font-weight="bold"'),
        _text(centre, 42, answer, f' font-weight="bold" fill="{colour}"'),
    ]
    joined = joined_rows(rows, rotation, half)
    products = head.products(rows, rotation, start.position, start.distance)
    for pair, (place, other, row, partner) in enumerate(joined):
        left, right = _middle(place), _middle(other)
        # Arcs of one height would hide each other where they cross.
        tall = 30 + 7 * pair if other > place + 1 else 28
        x = _WIDTH / half * (pair + 0.5)
        parts += [
            f'<path d="M{left:g} {_TOP}A{(right - left) / 2:g} {tall} 0 0 1 {right:g} {_TOP}" '
            f'fill="none" stroke="{colour}" stroke-width="3"{dash}/>',
            _text(x, _TOP + 68, f"{row_name(row, half)} + {row_name(partner, half)}"),
            _text(x, _TOP + 90, number(products[pair], head.digits)),
        ]
    parts += [_cell(place, row, half) for place, row in enumerate(_row_at(rows, half))]
    total = (
        f'<tspan font-weight="bold" fill="{colour}">{number(sum(products), head.digits)}</tspan>'
    )
    return "".join([*parts, _text(centre, _TOP + 122, f"q × k per pair, summed: {total}")])


def _text(x: float, y: int, words: str, look: str = "") -> str:
    return f'<text x="{x:g}" y="{y}"{look}>{words}</text>'


def _middle(place: int) -> float:
    return 8 + (place + 0.5) * _CELL


def row_name(row: int, half: int) -> str:
    """Return the name of a row: a and b are the two members of a pair, the digit is the pair."""
    return "ab"[row // half] + "₀₁₂₃₄₅₆₇"[row % half]


def _cell(place: int, row: int, half: int) -> str:
    colour = COLOURS[row % half]
    ground, text = ("none", INK) if row >= half else (colour, "#fff")
    look = f' font-weight="bold" fill="{text}"'
    return (
        f'<rect x="{11 + place * _CELL}" y="{_TOP + 2}" width="{_CELL - 6}" height="34" rx="4" '
        f'fill="{ground}" stroke="{colour}" stroke-width="3"/>'
        + _text(_middle(place), _TOP + 24, row_name(row, half), look)
    )
