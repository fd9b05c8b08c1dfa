"""Llama 3's scaling of the frequencies, and the wrong factor by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamaconv.figures.picture import MARKERS, Picture, drawing, picture

if TYPE_CHECKING:
    from llamaconv.lesson import Mismatch, Stretch


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


def mismatch_by_distance(found: Mismatch) -> Picture:
    """The error of a score where a model runs with another Llama's scaling."""
    with drawing(7.6, 3.4) as (figure, axes):
        axes.plot(found.distances[1:].numpy(), found.errors[1:].numpy(), linewidth=2)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, 1.5)
        ticks = [1, 16, 256, 4096, 65536]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.axvline(8192, color="0.5", linestyle=":")
        axes.text(7600, 1.47, "original length, 8,192", ha="right", va="top", fontsize=9)
        for distance in (16, 256, 4096):
            error = found.at(distance)
            axes.plot(distance, error, "o", color="#C85200", markersize=7)
            axes.annotate(
                f"{error:.2f}", (distance, error), (0, 9), textcoords="offset points", ha="center"
            )
        axes.set_xlabel("distance between query and key, positions")
        axes.set_ylabel("error of the scores,\nrelative")
        axes.set_title(f"trained as {found.trained}, run as {found.run}", loc="left", fontsize=10)
        return picture(
            figure,
            f"Error of the scores of {found.trained} run as {found.run}: {found.at(16):.2f} of the scores "
            f"at distance 16, {found.at(256):.2f} at 256, {found.at(4096):.2f} at 4096.",
            "Root mean square for random q and k of 128 rows, in units of the right scores' own.",
        )
