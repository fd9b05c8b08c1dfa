"""The plan as pictures: what it does to which bytes, and the rows of one tensor before and after."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch, Rectangle

from llamaconv import keys
from llamaconv.figures.picture import Picture, drawing, picture
from llamaconv.plan import Plan
from llamaconv.tables import size

if TYPE_CHECKING:
    from llamaconv.sample_rows import SampleRows

# Colour and hatch of each operation, so that neither is needed.
_LOOK = {
    "copy": ("#ABABAB", ""),
    "reorder": ("#FF800E", "///"),
    "cast": ("#5F9ED1", "..."),
    "tie": ("#A2C8EC", "xxx"),
}
_FOLLOWED, _PARTNER = "#C85200", "#006BA4"


def operations(plan: Plan) -> Picture:
    """Bytes to write by kind of tensor, a bar each, with the operation as colour and hatch."""
    written: Counter[tuple[str, str]] = Counter()
    for move in plan.written:
        written[move.place[0], move.operation] += move.nbytes
    roles = [role for role in keys.ROLES if any(role == one for one, _ in written)]
    most = max(written.values(), default=1)
    with drawing(7.2, 0.3 * max(3, len(roles)) + 1.0) as (figure, axes):
        for at, role in enumerate(roles):
            left = 0
            for operation, (colour, hatch) in _LOOK.items():
                if n_bytes := written[role, operation]:
                    axes.barh(at, n_bytes, left=left, color=colour, hatch=hatch, edgecolor="0.25")
                    left += n_bytes
            axes.text(left + 0.01 * most, at, size(left), va="center", fontsize=9)
        labels = [_template(plan, role) for role in roles]
        axes.set_yticks(range(len(roles)), labels, fontsize=9)
        axes.set_ylim(max(2, len(roles)) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * most)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        used = [one for one in _LOOK if any(one == operation for _, operation in written)]
        handles = [
            Patch(facecolor=_LOOK[one][0], hatch=_LOOK[one][1], edgecolor="0.25", label=one)
            for one in used
        ]
        legend = {"frameon": False, "ncols": 4, "loc": "lower left", "bbox_to_anchor": (0, 1)}
        if handles:
            axes.legend(handles=handles, **legend)
        else:
            axes.text(0.5, 0.5, "nothing to write", ha="center", transform=axes.transAxes)
        totals = ", ".join(_total(plan, one) for one in used) or "nothing"
        return picture(
            figure,
            f"A bar for each kind of tensor, as long as the bytes to write. By operation: {totals}. "
            f"Re-ordered are {_reordered(written)}.",
            "What the plan does to which bytes; N is the layer, and a bar holds all layers.",
        )


def _template(plan: Plan, role: str) -> str:
    return keys.ROLES[role].names[plan.target.naming] or role


def _total(plan: Plan, operation: str) -> str:
    found = [move for move in plan.written if move.operation == operation]
    return f"{operation} {len(found)} tensors, {size(sum(move.nbytes for move in found))}"


def _reordered(written: Counter[tuple[str, str]]) -> str:
    roles = [role for role, operation in written if operation == "reorder"]
    return " and ".join(roles) + " only" if roles else "none"


def sample_rows(sample: SampleRows, row: int = 1) -> Picture:
    """Rows of one tensor as two maps with one range of colours, and a line from row to row.

    ``row`` of the target's block is followed, with the row that RoPE turns it with.
    """
    before, after = sample.source.numpy(), sample.target.numpy()
    count, numbers = before.shape
    most = float(abs(before).max()) or 1.0
    width, gap = 16.0, 9.0
    # Places of the followed row and its partner; rows of no head have none.
    followed = _followed(sample, row % count)
    with drawing(7.6, max(3.0, min(9.0, 0.2 * count + 1.3))) as (figure, axes):
        look = {"cmap": "RdBu_r", "vmin": -most, "vmax": most, "aspect": "auto"}
        for left, values in ((0.0, before), (width + gap, after)):
            drawn = axes.imshow(values, extent=(left, left + width, count, 0), **look)
            box = Rectangle((left, 0), width, count, fill=False, edgecolor="0.3", linewidth=0.8)
            axes.add_patch(box)
        for place, origin in enumerate(sample.order):
            # So many lines of a long head would be a grey wall.
            thin = 0.8 if count <= 32 else 0.3
            colour, line, thick = followed.get(place, ("0.75", "-", thin))
            ends = ([width, width + gap], [origin + 0.5, place + 0.5])
            axes.plot(*ends, line, color=colour, linewidth=thick, zorder=3 if thick > 1 else 1)
            if place in followed:
                for left, y in ((0.0, origin), (width + gap, place)):
                    _frame(axes, left, y, width, colour, line)
                if count > 32:  # not every row has its number beside it
                    words = str(sample.first + origin)
                    box_of = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                    axes.text(
                        width + 0.5,
                        origin - 0.02 * count,
                        words,
                        color=colour,
                        fontsize=9,
                        va="center",
                        bbox=box_of,
                        zorder=5,
                    )
        step = max(1, count // 16)
        ticks = range(0, count, step)
        axes.set_yticks([at + 0.5 for at in ticks], [sample.first + at for at in ticks], fontsize=9)
        for at in ticks:
            words = str(sample.first + sample.order[at])
            axes.text(2 * width + gap + 0.3, at + 0.5, words, va="center", fontsize=9)
        titles = ((0.0, f"source, {sample.dtype}"), (width + gap, f"target, {sample.move.dtype}"))
        for left, title in titles:
            axes.text(left + width / 2, -0.02 * count - 0.1, title, ha="center", va="bottom")
        axes.set(
            xlim=(0, 2 * width + gap + 3.6), ylim=(1.004 * count, -0.09 * count - 0.4), xticks=[]
        )
        axes.set_ylabel("row")
        axes.text(2 * width + gap + 2.4, count / 2, "was row", rotation=270, va="center")
        axes.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="value")
        return picture(figure, _words(sample), _caption(sample, numbers))


def _followed(sample: SampleRows, row: int) -> dict[int, tuple[str, str, float]]:
    """By place in the target: colour, dash and width of the followed row and of its partner."""
    if not sample.heads:
        return {}
    place = sample.order.index(row)
    half = len(sample.order) // 2
    partner = sample.order.index((row + half) % len(sample.order))
    if sample.order[1] != half:  # the target is half_split: neighbours in the source are a pair
        partner = sample.order.index(row ^ 1)
    return {place: (_FOLLOWED, "-", 2.4), partner: (_PARTNER, "--", 2.4)}


def _frame(axes: Any, left: float, y: int, width: float, colour: str, line: str) -> None:
    box = Rectangle((left, y), width, 1, fill=False, edgecolor=colour, linestyle=line, zorder=4)
    box.set_linewidth(2.0)
    axes.add_patch(box)


def _words(sample: SampleRows) -> str:
    key, count = sample.move.target, len(sample.order)
    if not sample.heads:
        return f"The first {count} rows of {key}, source and target: every row is at its place."
    kept = sample.dtype == sample.move.dtype
    numbers = "holds the same numbers" if kept else f"is cast to {sample.move.dtype}"
    moved = sum(place != origin for place, origin in enumerate(sample.order))
    return (
        f"One head of {key}, rows {sample.first} to {sample.first + count - 1}, source and target: "
        f"{moved} of {count} rows have another place, and each row {numbers}."
    )


def _caption(sample: SampleRows, numbers: int) -> str:
    lines = " Solid, a row that is followed; dashed, the one that RoPE turns with it."
    return (
        f"{sample.move.source}, the first {numbers} numbers of each row, one range of colours for "
        f"both maps. On the right, the source row that stands there.{lines if sample.heads else ''}"
    )
