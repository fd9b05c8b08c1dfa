"""A head of Llama 3: its frequencies, and the error of wrong ones by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaconv.notebook.figures.picture import (
    COLOURS,
    INK,
    MARKERS,
    Picture,
    drawing,
    label_ends,
    picture,
    run_look,
)

if TYPE_CHECKING:
    from llamaconv.notebook.lesson import Mismatch, Stretch

# Distances that are marked and stated, far apart on a logarithmic scale.
_NAMED = (1, 16, 256, 4096, 65536)


def frequencies(stretch: Stretch) -> Picture:
    """Draw the radians per position of each pair of a head, before and after the scaling."""
    with drawing(7.4, 3.6) as (figure, axes):
        for number, inverse_F in enumerate(stretch.by_name.values()):
            axes.semilogy(
                inverse_F.numpy(),
                ("-", "--", ":")[number % 3],
                color=COLOURS[number],
                marker=MARKERS[number],
                markevery=(3 * number, 8),
                markersize=6,
            )
        end = stretch.kept + stretch.blended
        axes.axvspan(stretch.kept - 0.5, end - 0.5, color=INK, alpha=0.25, linewidth=0, zorder=0)
        axes.set_ylim(axes.get_ylim())
        top = axes.get_ylim()[1]
        for x, label in (
            (stretch.kept / 2, "unchanged"),
            ((stretch.kept + end) / 2 - 0.5, "blended"),
            ((end + stretch.n_pairs) / 2, "divided by the factor"),
        ):
            axes.text(x, top, label, ha="center", va="bottom", fontsize=10)
        axes.set_xlabel("pair")
        axes.set_ylabel("radians per position")
        label_ends(axes, list(stretch.by_name))
        return picture(
            figure,
            f"Frequencies of the {stretch.n_pairs} pairs of a head, on a logarithmic scale: the "
            f"first {stretch.kept} are the same in every Llama 3, {stretch.blended} are blended, "
            f"and the last {stretch.n_pairs - end} are divided by the factor, 8 in Llama 3.1 and "
            "32 in Llama 3.2.",
            "A head of 128 rows: base 500000, low 1, high 4, original length 8192. The slow pairs "
            "tell long distances apart.",
        )


def mismatch_by_distance(found: Mismatch, other: Mismatch | None = None) -> Picture:
    """Draw the error of a score by distance; ``other`` is a grey line for comparison."""
    drawn = [one for one in (found, other) if one]
    looks = [
        {"color": run_look(int(found.trained != found.run))["color"], "linewidth": 2.4},
        {"color": INK, "linestyle": "--", "linewidth": 1.5},
    ]
    with drawing(7.8, 3.7) as (figure, axes):
        for one, look in zip(drawn, looks, strict=False):
            axes.plot(one.distances[1:].numpy(), one.errors[1:].numpy(), **look)
        for distance in _NAMED:
            error = found.at(distance)
            axes.plot(distance, error, "o", color=looks[0]["color"], markersize=8)
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
            place |= {"color": looks[0]["color"], "weight": "bold"}
            near = (found.distances > distance / 2) & (found.distances < distance * 2)
            above = found.errors[near].max().item()  # the line itself should not cross the number
            axes.annotate(f"{error + 0.0:.2f}", (distance, above), (0, 7), **place)
        most = max(one.errors.max().item() for one in drawn)
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.03, max(1.65, 1.15 * most))
        axes.set_xticks(_NAMED, [f"{distance:,}" for distance in _NAMED])
        axes.minorticks_off()
        axes.set_xlabel("distance between query and key, positions")
        axes.set_ylabel("error of the scores,\nrelative")
        label_ends(axes, [f"{one.trained},\nrun as {one.run}" for one in drawn])
        errors = ", ".join(f"{found.at(distance) + 0.0:.2f} at {distance}" for distance in _NAMED)
        return picture(
            figure,
            f"Error of the scores of {found.trained} run as {found.run}, by distance: {errors}.",
            "A head of 128 rows, base 500000, random q and k. Root mean square, in units of the "
            "right scores' own. At distance 0 the error is 0.",
        )
