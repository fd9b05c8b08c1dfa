"""What right and wrong weights do to text: loss, loss by position, and agreement by length.

Colour and mark follow what was done to the weights, never how well it went: with untrained weights
a wrong run can be as good as the right one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from llamaconv.notebook.figures.picture import (
    INK,
    RIGHT,
    WRONG,
    Picture,
    bar_look,
    doubling,
    drawing,
    label_ends,
    picture,
    run_look,
)

if TYPE_CHECKING:
    from llamaconv.notebook.lesson import AgreementByLength, Losses


# A smaller difference of losses, in nats, says nothing about which weights are right.
_LEVEL = 0.05


def loss_bars(losses: Losses, guessing: int | None = None) -> Picture:
    """Draw one bar per run; the first run is the right one.

    Args:
        losses: The losses.
        guessing: A number of tokens. A line then shows the loss of guessing among them.
    """
    means = losses.means
    chance = math.log(guessing) if guessing else 0.0
    longest = max(*means.values(), chance)
    with drawing(7.6, 0.44 * len(means) + 1.2) as (figure, axes):
        for at, mean in enumerate(means.values()):
            axes.barh(at, mean, height=0.7, **bar_look(wrong=at > 0))
            words = f"{mean:.1f} {'✗' if at else '✓'}"
            look: dict[str, Any] = {"va": "center", "weight": "bold"}
            colour = WRONG if at else RIGHT
            if mean > 0.2 * longest:
                # A hatch behind a number would make it hard to read.
                look |= {"bbox": {"facecolor": colour, "edgecolor": "none", "pad": 2}}
                axes.text(mean - 0.015 * longest, at, words, ha="right", color="white", **look)
            else:
                axes.text(mean + 0.015 * longest, at, words, color=colour, **look)
        if guessing:
            axes.axvline(chance, color=INK, linestyle=":", zorder=0)
            words = f"guessing among {guessing:,}: {chance:.1f}"
            axes.text(chance, -0.6, words, ha="center", va="bottom", fontsize=10)
        axes.set_yticks(range(len(means)), list(means), fontsize=11)
        axes.set_ylim(len(means) - 0.5, -0.6)
        axes.set_xlim(0, 1.1 * longest)
        axes.set_xlabel(f"loss on held-out text, nats per {losses.unit}")
        return picture(
            figure,
            f"Loss in nats per {losses.unit}, lower is better: {_listed(means)}. "
            f"{_conclusion(means)}",
            "Mean over the whole text. Right: solid blue. Wrong: hatched orange.",
        )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value + 0.0:.1f}" for name, value in values.items())


def _conclusion(losses: Mapping[str, float]) -> str:
    """Say how the wrong runs compare with the first one, which is right."""
    right, *wrong = losses.values()
    better = sum(loss < right - _LEVEL for loss in wrong)
    worse = sum(loss > right + _LEVEL for loss in wrong)
    if worse == len(wrong):
        return "Every wrong run is worse than the right one."
    level = len(wrong) - better - worse
    return (
        f"Of {len(wrong)} wrong runs, {worse} are worse than the right one, {better} better, and "
        f"{level} within {_LEVEL:g} nats of it: these weights do not show the difference."
    )


def loss_by_position(losses: Losses) -> Picture:
    """Draw the loss by how much text came before: one line per run, the first one is right."""
    groups = doubling(len(next(iter(losses.by_name.values()))))
    names = [str(a + 1) if b == a + 1 else f"{a + 1}–{b}" for a, b in groups]
    grouped = {
        name: [loss[a:b].mean().item() for a, b in groups] for name, loss in losses.by_name.items()
    }
    with drawing(7.6, 3.8) as (figure, axes):
        most = max(map(max, grouped.values()))
        _lines(axes, grouped, names, most)
        axes.set_xlabel(f"{losses.unit}s read before the next one")
        axes.set_ylabel(f"loss, nats per {losses.unit}")
        return picture(
            figure,
            f"Loss by the text read so far. After {names[0]} {losses.unit}: {_at(grouped, 0)}. "
            f"After {names[-1]}: {_at(grouped, -1)}.",
            f"Mean over the windows of the text. Each group of {losses.unit}s is twice as long as "
            "the one before it. Right: solid blue. Wrong: orange, dashed.",
        )


def _lines(
    axes: Any, runs: Mapping[str, Sequence[float]], groups: Sequence[str], most: float
) -> None:
    """Draw one line per run over groups of positions, named at its end."""
    for number, values in enumerate(runs.values()):
        axes.plot(values, **run_look(number))
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.06 * most)
    label_ends(axes, list(runs))


def _at(runs: Mapping[str, Sequence[float]], at: int) -> str:
    """Describe the runs at one place: the first one, and the range of the wrong ones."""
    (name, right), *wrong = ((name, values[at]) for name, values in runs.items())
    found = [value for _, value in wrong]
    low, high = f"{min(found) + 0.0:.1f}", f"{max(found) + 0.0:.1f}"
    if len(found) == 1:
        return f"{name} {right + 0.0:.1f}, {wrong[0][0]} {low}"
    return f"{name} {right + 0.0:.1f}, the wrong ones {low if low == high else f'{low} to {high}'}"


def agreement_by_length(agreement: AgreementByLength) -> Picture:
    """Draw how often each wrong run has the right most likely next token, by tokens read."""
    names = [
        str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in itertools.pairwise(agreement.lengths)
    ]
    runs = {"right": [1.0] * len(names), **agreement.by_variant}
    with drawing(7.6, 3.8) as (figure, axes):
        _lines(axes, runs, names, 1.0)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0%", "25%", "50%", "75%", "100%"))
        axes.set_xlabel(f"{agreement.unit}s read")
        axes.set_ylabel(f"same next {agreement.unit}\nas the right weights")
        first, last = (
            ", ".join(f"{name} {shares[at]:.0%}" for name, shares in agreement.by_variant.items())
            for at in (0, -1)
        )
        return picture(
            figure,
            f"Share of positions at which each wrong run has the same most likely next "
            f"{agreement.unit} as the right one. After {names[0]}: {first}. After {names[-1]}: "
            f"{last}.",
            f"Mean over {agreement.windows} windows of text. Right: solid blue, 100% by definition. "
            "Wrong: orange, dashed.",
        )


def layouts_and_rotations(losses: Losses) -> Picture:
    """Draw the four combinations of rows and rotation as a square; one diagonal is right."""
    layouts = ("half_split", "interleaved")
    means = list(losses.means.values())
    with drawing(5.6, 3.1) as (figure, axes):
        for at, mean in enumerate(means):
            row, column = divmod(at, 2)
            wrong = row != column
            look = bar_look(wrong)
            axes.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, **look))
            words = f"{'✗' if wrong else '✓'}  {mean:.1f}"
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 16}
            place |= {"color": "white", "weight": "bold"}
            # A hatch behind a number would make it hard to read.
            box = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 5}
            axes.text(column, row, words, bbox=box, **place)
        axes.set_xticks((0, 1), layouts, fontsize=11)
        axes.set_yticks((0, 1), layouts, fontsize=11)
        axes.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5))
        axes.tick_params(length=0)
        axes.set_xlabel("rotation")
        axes.set_ylabel("rows of q and k")
        axes.spines[:].set_visible(False)
        right, wrong_ones = (means[0], means[3]), (means[1], means[2])
        conclusion = "The two right ones, on one diagonal, are lower than the two wrong ones."
        if max(right) > min(wrong_ones) - _LEVEL:
            conclusion = "The wrong ones are not clearly higher: these weights do not show it."
        return picture(
            figure,
            "A square of two layouts of rows by two rotations, loss in nats per "
            f"{losses.unit}: {_listed(losses.means)}. {conclusion}",
            f"Loss in nats per {losses.unit}. Right, blue with ✓: rows and rotation use the same "
            "layout. Wrong, hatched orange with ✗: they do not.",
        )
