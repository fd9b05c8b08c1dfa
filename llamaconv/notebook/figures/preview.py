"""The plan as pictures: its operations by bytes, and the rows of one tensor before and after."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch, Rectangle

from llamaconv.model.names import ROLES
from llamaconv.notebook.figures.picture import COLOURS, INK, SIGNED, Picture, drawing, picture
from llamaconv.notebook.figures.rope import FOLLOWED
from llamaconv.plan.plan import Plan
from llamaconv.report.tables import size

if TYPE_CHECKING:
    from llamaconv.notebook.sample_rows import SampleRows

# Colour and hatch of each operation; either is enough to tell them apart.
_LOOKS: dict[str, dict[str, Any]] = {
    "copy": {"facecolor": INK, "hatch": ""},
    "reorder": {"facecolor": COLOURS[0], "hatch": "///"},
    "cast": {"facecolor": COLOURS[2], "hatch": "..."},
    "tie": {"facecolor": COLOURS[1], "hatch": "xxx"},
}
for _look in _LOOKS.values():
    _look |= {"edgecolor": "white", "linewidth": 0}
# The width of each map of `sample_rows` and the gap between them, in units of the x axis.
_WIDTH, _GAP = 16.0, 9.0


def operations(plan: Plan) -> Picture:
    """Draw the bytes to write: one bar per kind of tensor, coloured by operation."""
    written: Counter[tuple[str, str]] = Counter()
    for move in plan.written:
        written[move.place[0], move.operation] += move.nbytes
    roles = [role for role in ROLES if any(role == one for one, _ in written)]
    used = [one for one in _LOOKS if any(one == operation for _, operation in written)]
    most = max(written.values(), default=1)
    with drawing(7.2, 0.3 * max(3, len(roles)) + 1.0) as (figure, axes):
        for at, role in enumerate(roles):
            left = 0
            for operation in used:
                if n_bytes := written[role, operation]:
                    axes.barh(at, n_bytes, left=left, **_LOOKS[operation])
                    left += n_bytes
            axes.text(left + 0.01 * most, at, size(left), va="center", fontsize=10)
        labels = [ROLES[role].names[plan.target.naming] or role for role in roles]
        axes.set_yticks(range(len(roles)), labels, fontsize=10)
        axes.set_ylim(max(2, len(roles)) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * most)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        if used:
            handles = [Patch(label=one, **_LOOKS[one]) for one in used]
            legend = {"frameon": False, "ncols": 4, "loc": "lower left", "bbox_to_anchor": (0, 1)}
            axes.legend(handles=handles, **legend)
        else:
            axes.text(0.5, 0.5, "nothing to write", ha="center", transform=axes.transAxes)
        totals = ", ".join(_total(plan, one) for one in used) or "nothing"
        moved = " and ".join(role for role, operation in written if operation == "reorder")
        return picture(
            figure,
            f"One bar per kind of tensor, as long as its bytes to write. By operation: {totals}. "
            f"Reordered: {moved + ' only' if moved else 'none'}.",
            "What the plan does to which bytes. N is the layer; a bar counts all layers.",
        )


def _total(plan: Plan, operation: str) -> str:
    found = [move for move in plan.written if move.operation == operation]
    return f"{operation} {len(found)} tensors, {size(sum(move.nbytes for move in found))}"


def sample_rows(sample: SampleRows, row: int = 1) -> Picture:
    """Draw the rows of one tensor in source and target, and a line from each row to its new place.

    Args:
        sample: The rows.
        row: The source row, counted within the sample, that is followed with its partner in RoPE.
    """
    count, numbers = sample.source.shape
    with drawing(7.6, max(3.0, min(9.0, 0.2 * count + 1.3))) as (figure, axes):
        drawn = _maps(axes, sample)
        followed = _followed(sample, row % count)
        for place, origin in enumerate(sample.order):
            # In a long head, thick lines would be a grey wall.
            thin = 0.6 if count <= 32 else 0.2
            colour, line, thick = followed.get(place, (INK, "-", thin))
            ends = ([_WIDTH, _WIDTH + _GAP], [origin + 0.5, place + 0.5])
            axes.plot(*ends, line, color=colour, linewidth=thick, zorder=3 if thick > 1 else 1)
            if place in followed:
                for left, y in ((0.0, origin), (_WIDTH + _GAP, place)):
                    look: dict[str, Any] = {"edgecolor": colour, "linestyle": line}
                    look |= {"linewidth": 2.0, "zorder": 4}
                    axes.add_patch(Rectangle((left, y), _WIDTH, 1, fill=False, **look))
                if count > 32:  # not every row has its number next to it
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                    look = {"color": "white", "fontsize": 10, "va": "center", "bbox": box}
                    at = (_WIDTH + 0.5, origin - 0.02 * count)
                    axes.text(*at, str(sample.first + origin), zorder=5, **look)
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="value")
        lines = " Solid: the followed row. Dashed: the row that RoPE rotates with it."
        caption = (
            f"{sample.move.source}: the first {numbers} numbers of each row, one colour scale for "
            f"both maps. On the right: the source row.{lines if sample.heads else ''}"
        )
        return picture(figure, _alt(sample), caption)


def _maps(axes: Any, sample: SampleRows) -> Any:
    """Draw source and target with their row numbers; return the last image."""
    before, after = sample.source.numpy(), sample.target.numpy()
    count, right = len(before), _WIDTH + _GAP
    most = float(abs(before).max()) or 1.0
    look = {"cmap": SIGNED, "vmin": -most, "vmax": most, "aspect": "auto"}
    for left, values, title in (
        (0.0, before, f"source, {sample.dtype}"),
        (right, after, f"target, {sample.move.dtype}"),
    ):
        drawn = axes.imshow(values, extent=(left, left + _WIDTH, count, 0), **look)
        frame = Rectangle((left, 0), _WIDTH, count, fill=False, edgecolor=INK, linewidth=0.8)
        axes.add_patch(frame)
        axes.text(left + _WIDTH / 2, -0.02 * count - 0.1, title, ha="center", va="bottom")
    ticks = range(0, count, max(1, count // 16))
    axes.set_yticks([at + 0.5 for at in ticks], [sample.first + at for at in ticks], fontsize=10)
    for at in ticks:
        origin = str(sample.first + sample.order[at])
        axes.text(right + _WIDTH + 0.3, at + 0.5, origin, va="center", fontsize=10)
    axes.text(right + _WIDTH + 2.4, count / 2, "source row", rotation=270, va="center")
    axes.set(xlim=(0, right + _WIDTH + 3.6), ylim=(1.004 * count, -0.09 * count - 0.4), xticks=[])
    axes.set_ylabel("row")
    axes.spines[:].set_visible(False)
    return drawn


def _followed(sample: SampleRows, row: int) -> dict[int, tuple[str, str, float]]:
    """Return colour, dash and width of the followed row and its partner, by place in the target."""
    if not sample.heads:
        return {}
    half = len(sample.order) // 2
    partner = (row + half) % len(sample.order)
    if sample.order[1] != half:  # the target is half_split: neighbours in the source are a pair
        partner = row ^ 1
    place = sample.order.index
    return {place(row): (FOLLOWED, "-", 2.4), place(partner): (FOLLOWED, "--", 2.4)}


def _alt(sample: SampleRows) -> str:
    key, count = sample.move.target, len(sample.order)
    if not sample.heads:
        return f"The first {count} rows of {key}, source and target: every row keeps its place."
    kept = sample.dtype == sample.move.dtype
    numbers = "keeps its numbers" if kept else f"is cast to {sample.move.dtype}"
    moved = sum(place != origin for place, origin in enumerate(sample.order))
    return (
        f"One head of {key}, rows {sample.first} to {sample.first + count - 1}, source and target: "
        f"{moved} of {count} rows change places, and each row {numbers}."
    )
