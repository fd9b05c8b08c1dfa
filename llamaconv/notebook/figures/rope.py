"""The pairs of RoPE: how they rotate, which rows are partners, and where a row goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Arc, Circle, Rectangle

from llamaconv.notebook.figures.picture import (
    COLOURS,
    INK,
    RIGHT,
    WRONG,
    Picture,
    drawing,
    picture,
)

if TYPE_CHECKING:
    from llamaconv.notebook.lesson import RotatedPairs, SameDistance

# The followed row and its partner have one colour: they are a pair. The partner is dashed.
FOLLOWED = COLOURS[1]
# Vectors of q and of k: a colour and a dash each.
_VECTORS = (("q", COLOURS[0], "-"), ("k", COLOURS[2], "--"))
_DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _pair_colour(pair: int) -> str:
    return COLOURS[pair % len(COLOURS)]


def rotation(rotated: RotatedPairs, position: int | None = None) -> Picture:
    """Draw each pair as a point that rotates from position 0 to ``position``, or to the last."""
    last = len(rotated.points) - 1 if position is None else position
    columns = len(rotated.pairs)
    with drawing(1.95 * columns, 2.75, columns=columns, squeeze=False) as (figure, axes):
        for at, (pair, speed) in enumerate(zip(rotated.pairs, rotated.per_position, strict=True)):
            one, colour = axes[0, at], _pair_colour(at)
            points = (rotated.points[: last + 1, at] / rotated.points[0, at].norm()).tolist()
            one.add_patch(Circle((0, 0), 1, fill=False, color=INK, linewidth=0.8))
            one.plot([0, points[0][0]], [0, points[0][1]], ":", color=INK, linewidth=1.2)
            one.plot([0, points[-1][0]], [0, points[-1][1]], color=colour, linewidth=2)
            for number, (x, y) in enumerate(points):
                # The first point is hollow, the last is the largest.
                one.plot(
                    x,
                    y,
                    "o",
                    markersize=10 if number == last else 6,
                    color=colour,
                    fillstyle="full" if number else "none",
                )
                # Numbers would overlap between close points; there the two ends are enough.
                far = abs(((last - number) * speed + math.pi) % math.tau - math.pi) > 0.25
                words = str(number) if speed > 0.25 and number * speed < 6.2 and far else ""
                if number == last:
                    words = f"0–{last}" if 0 < last * speed < 0.3 else str(last)
                elif number == 0 and last * speed >= 0.3:
                    words = "0"
                one.text(1.27 * x, 1.27 * y, words, ha="center", va="center", fontsize=10)
            title = f"rows {pair} and {pair + rotated.head_dim // 2}\n{speed:.2g} rad per position"
            one.text(0, 1.5, f"pair {pair}", ha="center", va="bottom", weight="bold")
            one.text(0, -1.5, title, ha="center", va="top", fontsize=10)
            one.set(xlim=(-1.5, 1.5), ylim=(-2.1, 1.8), aspect="equal")
            one.axis("off")
        fastest, slowest = (abs(rotated.per_position[end]) * last for end in (0, -1))
        return picture(
            figure,
            f"One circle per pair, with points numbered by position from 0 to {last}: pair "
            f"{rotated.pairs[0]} has rotated by {fastest:.2g} radians, pair {rotated.pairs[-1]} by "
            f"{slowest:.2g}; none has changed its length.",
            "q of head 0 for one token, at growing positions. Each pair of rows is one point with "
            "its own speed; the number is the position.",
        )


def same_distance(found: SameDistance) -> Picture:
    """Draw the directions of one pair of q and k at several positions, and the angle between."""
    columns = len(found.positions)
    angles = []
    with drawing(3.3 * columns, 3.5, columns=columns, squeeze=False) as (figure, axes):
        for at, (one, (m, n)) in enumerate(zip(axes[0], found.positions, strict=True)):
            one.add_patch(Circle((0, 0), 1, fill=False, color=INK, linewidth=0.8, linestyle=":"))
            directions = [
                math.atan2(*reversed(points[at].tolist())) for points in (found.q, found.k)
            ]
            for (name, colour, dash), direction, position in zip(
                _VECTORS, directions, (m, n), strict=True
            ):
                x, y = math.cos(direction), math.sin(direction)
                one.plot([0, x], [0, y], dash, color=colour, linewidth=2.6)
                one.plot(x, y, "o", color=colour, markersize=9)
                look = {"ha": "center", "va": "center", "color": colour}
                one.text(1.2 * x, 1.2 * y, name, weight="bold", **look)
                one.text(-0.7 if name == "q" else 0.7, -1.5, f"{name} at {position}", **look)
            angles.append(_angle_arc(one, *directions))
            title = f"m − n = {m - n}:  {angles[-1]:.0f}° apart"
            one.text(0, 1.55, title, ha="center", va="center", weight="bold")
            one.set(xlim=(-1.4, 1.4), ylim=(-1.65, 1.7), aspect="equal")
            one.axis("off")
        listed = "; ".join(
            f"q at {m} and k at {n}, {angle:.0f} degrees"
            for (m, n), angle in zip(found.positions, angles, strict=True)
        )
        same = "The angle is the same" if max(angles) - min(angles) < 0.1 else "The angles differ"
        products = " and ".join(f"{product + 0.0:.2f}" for product in found.products)
        return picture(
            figure,
            f"One pair of q and one of k as arrows, and the angle between them: {listed}. {same}; "
            f"the pair adds {products} to the score.",
            "q at position m, solid, and k at position n, dashed: directions only. Both rotate as "
            "their positions grow. The angle between them depends on m − n alone, and so does what "
            f"the pair adds to the score: {products}.",
        )


def _angle_arc(axes: Any, one: float, other: float) -> float:
    """Draw the smaller angle between two directions, and return it in degrees."""
    start, end = sorted((math.degrees(one), math.degrees(other)))
    if end - start > 180:
        start, end = end, start + 360
    axes.add_patch(Arc((0, 0), 0.7, 0.7, theta1=start, theta2=end, color=INK, linewidth=1.8))
    middle = math.radians((start + end) / 2)
    at = (0.57 * math.cos(middle), 0.57 * math.sin(middle))
    axes.text(*at, f"{end - start:.0f}°", ha="center", va="center", fontsize=10)
    return end - start


def pairings(head_dim: int = 16) -> Picture:
    """Draw which rows are partners in both layouts: rows on a line, one arc per pair."""
    half = head_dim // 2
    layouts = (
        ("half_split: row i and row i + head_dim/2", [(i, i + half) for i in range(half)]),
        ("interleaved: row 2i and row 2i + 1", [(2 * i, 2 * i + 1) for i in range(half)]),
    )
    with drawing(7.2, 3.9, 2, gridspec_kw={"height_ratios": (2.3, 1)}) as (figure, axes):
        for one, (name, pairs) in zip(axes, layouts, strict=True):
            for pair, (first, second) in enumerate(pairs):
                colour = _pair_colour(pair)
                # Arcs of one height would hide each other where they cross.
                tall = 4.6 + 0.35 * pair if second - first > 1 else 1.3
                _arc(one, first, second, tall, colour)
                for row, hollow in ((first, False), (second, True)):
                    _cell(one, row, 0, row, colour, hollow)
            one.set_title(name, loc="left", weight="bold")
            one.set(xlim=(-0.7, head_dim - 0.3), aspect="equal")
            one.set_ylim(-0.6, 0.7 + (4.6 + 0.35 * half) / 2 if pairs[0][1] > 1 else 1.4)
            one.axis("off")
        return picture(
            figure,
            f"Rows 0 to {head_dim - 1} of one head on a line, twice. half_split: arcs of equal "
            f"width join row i to row i + {half}. interleaved: short arcs join neighbours 2i "
            "and 2i + 1.",
            f"One head of {head_dim} rows. An arc joins partners: the two rows that RoPE rotates "
            "together. The second row of a pair is hollow. Numbers are places in the matrix.",
        )


def the_bug(head_dim: int = 8) -> Picture:
    """Draw which rows a program rotates together: two right programs, and the wrong one."""
    half = head_dim // 2
    # A row is its pair, and whether it is the second of it.
    split = [(pair, second) for second in (False, True) for pair in range(half)]
    woven = [(pair, second) for pair in range(half) for second in (False, True)]
    far = [(place, place + half) for place in range(half)]
    near = [(2 * place, 2 * place + 1) for place in range(half)]
    strips = (
        (f"half_split rows, code that pairs i with i + {half}", split, far),
        ("reordered rows, code that pairs neighbours", woven, near),
        ("half_split rows, code that pairs neighbours", split, near),
    )
    heights = [_over(half, half - 1) + 2.7, _over(1, 0) + 2.7, _over(1, 0) + 2.7]
    words, failed = [], []
    with drawing(
        max(5.7, 0.56 * head_dim + 1.2),
        0.56 * sum(heights) + 0.6,
        3,
        gridspec_kw={"height_ratios": heights},
    ) as (figure, axes):
        for one, (name, rows, joined), height in zip(axes, strips, heights, strict=True):
            wrong = _join(one, rows, joined)
            failed.append(len(wrong))
            for place, (pair, second) in enumerate(rows):
                _cell(one, place, 0, _row_name(pair, second), _pair_colour(pair), second, 11)
            says = "✓  every arc joins the two rows of a pair"
            if wrong:
                amount = "every arc joins" if len(wrong) == half else f"{len(wrong)} arcs join"
                says = f"✗  THE BUG: {amount} rows of two different pairs"
            words.append(f"{name}: {says[1:].strip()}")
            look = {"color": WRONG if wrong else RIGHT, "weight": "bold", "va": "top"}
            one.text(-0.5, -0.68, says, **look)
            one.set_title(name, loc="left")
            one.set(xlim=(-0.7, head_dim - 0.3), ylim=(-1.4, height - 1.4), aspect="equal")
            one.axis("off")
        a, b = _row_name(0, False), _row_name(0, True)
        return picture(
            figure,
            f"The {head_dim} rows of one head, three times, with an arc over each two rows that "
            f"the code rotates together. {'. '.join(words)}.",
            f"{a} and {b} are the two rows of pair 0: filled and hollow, one colour per pair. An "
            "arc is a rotation by the angle θ of the pair that the code believes to see.",
        )


def _row_name(pair: int, second: bool) -> str:
    return f"{'b' if second else 'a'}{pair}".translate(_DIGITS)


def _join(
    axes: Any, rows: list[tuple[int, bool]], joined: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Draw an arc over each two places that are rotated together; return the wrong ones.

    An arc is right if it joins the first and the second row of the pair whose angle it has.
    """
    wrong = []
    for angle, (first, second) in enumerate(joined):
        bad = (rows[first], rows[second]) != ((angle, False), (angle, True))
        if bad:
            wrong.append((first, second))
        top = _over(second - first, angle)
        _arc(axes, first, second, 2 * top, WRONG if bad else RIGHT, "--" if bad else "-")
        words = f"θ{angle}".translate(_DIGITS) + (" ✗" if bad else "")
        place = {"ha": "center", "va": "bottom", "fontsize": 10}
        place["color"] = WRONG if bad else RIGHT
        axes.text((first + second) / 2, 0.6 + top, words, **place)
    return wrong


def _over(wide: int, angle: int) -> float:
    """Return the height of an arc; wide ones differ, so that they do not hide each other."""
    return 0.65 if wide == 1 else 1.1 + 0.2 * angle


def heads_miscounted(n_heads: int, n_kv_heads: int, head_dim: int) -> Picture:
    """Draw k reordered by its own number of heads, and by a wrong one.

    Heads of many rows are drawn with fewer, and only as many heads as the mistake mixes.

    Args:
        n_heads: The wrong number: usually that of q.
        n_kv_heads: The number of heads in k.
        head_dim: The rows of a head.
    """
    dim = head_dim
    while max(dim, dim * n_kv_heads // n_heads) > _MOST_CELLS and dim % 2 == 0:
        dim //= 2
    block = dim * n_kv_heads // n_heads
    count = max(dim, block)
    source = [(head, row) for head in range(count // dim) for row in range(dim)]
    strips = []
    for name, size in (
        (f"reordered as {n_kv_heads} {_heads(n_kv_heads)} of {dim} rows", dim),
        (f"reordered as {n_heads} {_heads(n_heads)} of {block} rows", block),
    ):
        # Interleaving takes place 2i from row i of a block, and place 2i + 1 from row i + size/2.
        order = [
            start + place // 2 + place % 2 * (size // 2)
            for start in range(0, count, size)
            for place in range(size)
        ]
        strips.append((name, [source[row] for row in order]))
    with drawing(max(5.0, 0.29 * count + 0.5), 2.7, 2) as (figure, axes):
        wrong = [
            _miscounted(one, name, rows, dim)
            for one, (name, rows) in zip(axes, strips, strict=True)
        ]
        shown = "" if dim == head_dim else f" Heads of {head_dim} rows are drawn with {dim}."
        return picture(
            figure,
            f"{count} rows of k after two reorderings, with an arc over each two neighbours. By "
            f"its own {n_kv_heads} {_heads(n_kv_heads)}: {wrong[0]} of {count // 2} arcs join rows "
            f"that are no pair. By {n_heads}: {wrong[1]} of {count // 2}.",
            "A number is the row's place in its head before. Rows of a pair have one colour; the second is "
            f"hollow. Both results have the same shape, so nothing complains.{shown}",
        )


_MOST_CELLS = 24


def _heads(count: int) -> str:
    return "head" if count == 1 else "heads"


def _miscounted(axes: Any, name: str, rows: list[tuple[int, int]], dim: int) -> int:
    """Draw one strip of rows with arcs over neighbours; return how many of them are wrong."""
    half, wrong = dim // 2, 0
    for place, (_, row) in enumerate(rows):
        _cell(axes, place, 0, row, _pair_colour(row % half), row >= half)
    for first in range(0, len(rows), 2):
        (head, row), other = rows[first], rows[first + 1]
        bad = (row, other) != (first % dim // 2, (head, row + half))
        wrong += bad
        _arc(axes, first, first + 1, 1.5, WRONG if bad else RIGHT, "--" if bad else "-")
    says = f"✗  {wrong} of {len(rows) // 2} arcs join rows that are no pair"
    if not wrong:
        says = "✓  every arc joins the two rows of a pair"
    look = {"color": WRONG if wrong else RIGHT, "weight": "bold", "va": "top"}
    axes.text(-0.5, -0.75, says, **look)
    axes.set_title(name, loc="left")
    axes.set(xlim=(-0.7, len(rows) - 0.3), ylim=(-1.7, 1.5), aspect="equal")
    axes.axis("off")
    return wrong


def head_layouts(head_dim: int = 16) -> Picture:
    """Draw where each row of one head goes between the layouts: one line per row."""
    half = head_dim // 2
    with drawing(6.4, 0.28 * head_dim + 1.0) as (figure, axes):
        for row in range(head_dim):
            pair, second = row % half, row >= half
            target = 2 * pair + second
            colour, line = _pair_colour(pair), "--" if second else "-"
            axes.plot([1.15, 2.85], [row, target], line, color=colour, linewidth=1.6)
            box: dict[str, Any] = {
                "boxstyle": "round,pad=0.25",
                "facecolor": "none" if second else colour,
            }
            box |= {"edgecolor": colour, "linestyle": line, "linewidth": 1.6}
            place: dict[str, Any] = {"ha": "center", "va": "center", "bbox": box}
            place["fontsize"] = 10
            place |= {"color": INK} if second else {"color": "white", "weight": "bold"}
            for x, y in ((1, row), (3, target)):
                axes.text(x, y, f"row {row}", **place)
        axes.set_xlim(0.4, 3.6)
        axes.set_ylim(head_dim - 0.3, -1.6)
        axes.axis("off")
        for x, title in ((1, "half_split\n(Hugging Face)"), (3, "interleaved\n(Meta, TorchTitan)")):
            axes.text(x, -1.2, title, ha="center", va="center", weight="bold")
        return picture(
            figure,
            f"Two columns of the {head_dim} rows of one head, joined by lines: row i of the first "
            f"half goes to place 2i, row i + {half} to place 2i + 1, so that partners become "
            "neighbours.",
            f"One head of {head_dim} rows. The two rows of a pair have one colour. The second is "
            "hollow and its line is dashed. The converter moves rows, never numbers within a row.",
        )


def follow_row(row: int = 17, head_dim: int = 32) -> Picture:
    """Draw where ``row`` of one head and its partner go: one strip of rows per layout."""
    half = head_dim // 2
    partner = (row + half) % head_dim
    places = {one: 2 * (one % half) + one // half for one in range(head_dim)}
    with drawing(0.225 * head_dim + 0.4, 3.0) as (figure, axes):
        for one, place in places.items():
            colour, wide, above = INK, 0.6, 1
            if one in (row, partner):
                colour, wide, above = FOLLOWED, 3.0, 3
            line = "--" if one == partner else "-"
            axes.plot([one, place], [0.6, 3.4], line, color=colour, linewidth=wide, zorder=above)
            for x, y in ((one, 0.0), (place, 4.0)):
                _cell(axes, x, y, one, colour, one != row, 10 if head_dim <= 32 else 9)
        for height, name in (
            (-1.1, "half_split (Hugging Face)"),
            (5.1, "interleaved (Meta, TorchTitan)"),
        ):
            axes.text(-0.5, height, name, ha="left", va="center", weight="bold")
        end = {"x": head_dim - 0.5, "y": 5.1, "ha": "right", "va": "center", "weight": "bold"}
        axes.text(s=f"row {row} goes to place {places[row]}", color=FOLLOWED, **end)
        axes.set(xlim=(-0.8, head_dim - 0.2), ylim=(5.8, -1.8))
        axes.axis("off")
        return picture(
            figure,
            f"Two strips of the {head_dim} rows of one head: row {row} goes from place {row} to "
            f"place {places[row]}, its partner, row {partner}, from place {partner} to "
            f"{places[partner]}, next to it.",
            f"Row {row} (solid) and its partner, row {partner} (dashed). A number is the row's "
            "place in half_split. Rows change places; the numbers within a row stay.",
        )


def _arc(axes: Any, first: int, second: int, tall: float, colour: str, line: str = "-") -> None:
    """Draw half an ellipse over two cells."""
    centre = ((first + second) / 2, 0.55)
    look: dict[str, Any] = {
        "theta1": 0,
        "theta2": 180,
        "color": colour,
        "linewidth": 2.2,
        "linestyle": line,
    }
    axes.add_patch(Arc(centre, second - first, tall, **look))


def _cell(
    axes: Any, x: float, y: float, text: object, colour: str, hollow: bool, fontsize: int = 10
) -> None:
    """Draw one row as a small box with its number or name."""
    box = Rectangle((x - 0.44, y - 0.45), 0.88, 0.9, linewidth=1.8, zorder=4)
    box.set(facecolor="none" if hollow else colour, edgecolor=colour)
    axes.add_patch(box)
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": fontsize, "zorder": 5}
    look |= {"color": INK} if hollow else {"color": "white", "weight": "bold"}
    axes.text(x, y, text, **look)
