"""What the checks of a conversion found, as pictures."""

from __future__ import annotations

from llamaconv.checks import Verification
from llamaconv.figures.picture import Picture, drawing, picture


def score_errors(verification: Verification) -> Picture:
    """The rotated-score error of each layer, and the same done wrong, on a logarithmic scale."""
    errors = [max(error, 1e-9) for error, _ in verification.layers]
    wrong = [max(yardstick, 1e-9) for _, yardstick in verification.layers]
    layers = range(len(errors))
    with drawing(6.4, 3.0) as (figure, axes):
        axes.semilogy(layers, wrong, "s--", label="done wrong: rows left in the other layout")
        axes.semilogy(layers, errors, "o-", label="this conversion")
        axes.set_xlabel("layer")
        axes.set_ylabel("largest difference of\nrotated scores, relative")
        axes.set_ylim(1e-9, 30)
        axes.set_xticks(list(layers) if len(errors) <= 16 else list(layers)[:: len(errors) // 8])
        axes.legend(loc="center right", frameon=False)
        worst = max(errors, default=0.0)
        least = min(wrong, default=0.0)
        return picture(
            figure,
            f"In every layer the conversion's scores agree with the source's to better than "
            f"{_power_above(worst)}, while rows left in the other layout are off by {least:.1g} or more.",
            "Attention scores with the rotation of each layout, at distances above 0. "
            "Below 0.0001 is rounding.",
        )


def _power_above(value: float) -> str:
    """The power of ten just above, so that the words do not depend on the last bits."""
    power = 1e-9
    while power < value:
        power *= 10
    return f"{power:.0e}"
