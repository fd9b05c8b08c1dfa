"""A head as the Llamas have it: its frequencies, and what is off by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaconv.figures.picture import MARKERS, Picture, drawing, picture

if TYPE_CHECKING:
    from llamaconv.lesson import Mismatch, Stretch

# Distances that are marked and said, far apart on a logarithmic scale.
_NAMED = (1, 16, 256, 4096, 65536)


def frequencies(stretch: Stretch) -> Picture:
    """Radians per position of each pair of a head, before and after the scaling."""
    with drawing(7.6, 3.6) as (figure, axes):
        lines = ("-", "--", ":")
        for number, (name, inverse_F) in enumerate(stretch.by_name.items()):
            axes.semilogy(
                inverse_F.numpy(),
                lines[number % len(lines)],
                marker=MARKERS[number],
                markevery=(3 * number, 8),
                markersize=6,
                label=name,
            )
        end = stretch.kept + stretch.blended
        axes.axvspan(stretch.kept - 0.5, end - 0.5, color="0.9", zorder=0)
        top = axes.get_ylim()[1]
        for x, words in (
            (stretch.kept / 2, "kept"),
            ((stretch.kept + end) / 2 - 0.5, "blended"),
            ((end + stretch.n_pairs) / 2, "divided by the factor"),
        ):
            axes.text(x, top, words, ha="center", va="bottom", fontsize=9)
        axes.set_xlabel("pair")
        axes.set_ylabel("radians per position")
        axes.legend(frameon=False, loc="lower left")
        slow = stretch.n_pairs - end
        return picture(
            figure,
            f"Frequencies of the {stretch.n_pairs} pairs of a head, on a logarithmic scale: the first "
            f"{stretch.kept} are the same for every Llama 3, {stretch.blended} are blended, the last "
            f"{slow} are lower by the factor, 8 for Llama 3.1 and 32 for Llama 3.2.",
            "A head of 128 rows, base 500000, low 1, high 4, original length 8192. Slow pairs are "
            "the ones that tell long distances apart.",
        )


def mismatch_by_distance(found: Mismatch, beside: Mismatch | None = None) -> Picture:
    """The error of a score by distance; ``beside`` is another, drawn dashed to compare with."""
    with drawing(7.8, 3.5) as (figure, axes):
        if beside:
            label = f"{beside.trained}, run as {beside.run}"
            axes.plot(
                beside.distances[1:].numpy(),
                beside.errors[1:].numpy(),
                "--",
                color="0.5",
                label=label,
            )
        label = f"{found.trained}, run as {found.run}"
        axes.plot(found.distances[1:].numpy(), found.errors[1:].numpy(), linewidth=2, label=label)
        for distance in _NAMED:
            error = found.at(distance)
            axes.plot(distance, error, "o", color="C0", markersize=7)
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.annotate(f"{error:.2f}", (distance, error), (0, 10), **place)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.65)
        axes.set_xticks(_NAMED, [f"{distance:,}" for distance in _NAMED])
        axes.set_xlabel("distance between query and key, positions")
        axes.set_ylabel("error of the scores,\nrelative")
        axes.legend(frameon=False, loc="upper left")
        words = ", ".join(f"{found.at(distance):.2f} at {distance}" for distance in _NAMED)
        return picture(
            figure,
            f"Error of the scores of {found.trained} run as {found.run}, by distance: {words}.",
            "A head of 128 rows, base 500000, random q and k: root mean square in units of the right "
            "scores' own. At distance 0 the error is 0.",
        )
