"""What right and wrong weights cost on text, as bars and by position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llamaconv.figures.picture import MARKERS, Picture, doubling, drawing, picture

if TYPE_CHECKING:
    from llamaconv.lesson import Losses


def loss_bars(losses: Losses, guessing: int | None = None) -> Picture:
    """A bar a run; the first is the right one. ``guessing`` draws the loss of chance for as many
    tokens."""
    means = losses.means
    right = next(iter(means.values()))
    with drawing(7.2, 0.42 * len(means) + 1.1) as (figure, axes):
        for at, mean in enumerate(means.values()):
            good = mean < right + 0.01
            colour, hatch = ("#006BA4", "") if good else ("#FF800E", "//")
            axes.barh(at, mean, color=colour, hatch=hatch, edgecolor="white", height=0.7)
            axes.text(mean + 0.06, at, f"{mean:.1f}", va="center", fontsize=10)
        if guessing:
            axes.axvline(math.log(guessing), color="0.4", linestyle=":")
            axes.text(
                math.log(guessing),
                -0.75,
                "guessing",
                ha="center",
                va="bottom",
                fontsize=9,
                color="0.3",
            )
        axes.set_yticks(range(len(means)), list(means))
        axes.invert_yaxis()
        axes.set_xlabel(f"loss on held-out text, nats a {losses.unit}")
        words = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
        return picture(
            figure,
            f"Loss in nats a {losses.unit}, lower is better: {words}.",
            "Mean over the whole text. Right in solid blue, wrong in hatched orange.",
        )


def loss_by_position(losses: Losses) -> Picture:
    """The loss by how much text came before, a line a run."""
    groups = doubling(len(next(iter(losses.by_name.values()))))
    names = [str(a + 1) if b == a + 1 else f"{a + 1}–{b}" for a, b in groups]
    with drawing(8.0, 3.6) as (figure, axes):
        for number, (name, loss) in enumerate(losses.by_name.items()):
            grouped = [loss[a:b].mean().item() for a, b in groups]
            marker = MARKERS[number % len(MARKERS)]
            line = "-" if number == 0 else "--"
            axes.plot(grouped, line, marker=marker, markersize=7, linewidth=1.6, label=name)
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{losses.unit}s read before the next one")
        axes.set_ylabel(f"loss, nats a {losses.unit}")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        runs = list(losses.by_name.values())
        first, last = (
            max(_group(run, group) - _group(runs[0], group) for run in runs[1:])
            for group in (groups[0], groups[-1])
        )
        return picture(
            figure,
            f"Loss by the text read so far. After {names[0]} {losses.unit} the wrong runs lose at most "
            f"{first + 0.0:.1f} nats to the right one, after {names[-1]} up to {last:.1f}.",
            f"Mean over all windows of text; {next(iter(losses.by_name))} is the solid line.",
        )


def _group(loss: object, group: tuple[int, int]) -> float:
    return float(loss[group[0] : group[1]].mean())  # type: ignore[index]


def layouts_and_rotations(losses: Losses) -> Picture:
    """Rows of both layouts with both rotations: a square each, the loss in it."""
    means = list(losses.means.values())
    layouts = ("half_split", "interleaved")
    with drawing(4.9, 3.4) as (figure, axes):
        grid = [means[:2], means[2:]]
        drawn = axes.imshow(grid, cmap="cividis", vmin=0, vmax=max(means) * 1.1)
        right = min(means)
        for row in range(2):
            for column in range(2):
                good = grid[row][column] < right + 0.01
                words = f"{'✓' if good else '✗'}  {grid[row][column]:.1f}"
                colour = "white" if grid[row][column] < 0.55 * max(means) else "black"
                axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=15)
        axes.set_xticks((0, 1), layouts)
        axes.set_yticks((0, 1), layouts)
        axes.set_xlabel("rotation")
        axes.set_ylabel("rows of q and k")
        axes.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axes, shrink=0.9, label=f"loss, nats a {losses.unit}")
        words = ", ".join(f"{name} {mean:.1f}" for name, mean in losses.means.items())
        return picture(
            figure,
            f"A square of two layouts of rows by two rotations, loss in nats a {losses.unit}: {words}.",
            "The two ways out lie on one diagonal: rows and rotation have to be of one layout.",
        )
