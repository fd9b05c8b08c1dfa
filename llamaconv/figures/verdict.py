"""What the checks of a conversion found, as pictures."""

from __future__ import annotations

from llamaconv.checks import SCORE_TOLERANCE, Verification
from llamaconv.figures.picture import Picture, drawing, picture
from llamaconv.problems import some


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
        return picture(
            figure,
            _conclusion(errors, min(wrong, default=0.0)),
            "Attention scores with the rotation of each layout, at distances above 0. "
            "Below 0.0001 is rounding.",
        )


def _conclusion(errors: list[float], least_wrong: float) -> str:
    if not errors:
        return "No layer's scores were compared, since an earlier check failed."
    # nan is not below the tolerance.
    off = [str(layer) for layer, error in enumerate(errors) if not error <= SCORE_TOLERANCE]
    if off:
        return (
            f"The conversion's scores differ from the source's in {len(off)} of {len(errors)} layers "
            f"({some(off)}), as those of rows left in the other layout do."
        )
    return (
        f"In every layer the conversion's scores agree with the source's to better than "
        f"{_power_above(max(errors))}, while rows left in the other layout are off by "
        f"{least_wrong:.1g} or more."
    )


def _power_above(value: float) -> str:
    """The power of ten just above, so that the words do not depend on the last bits."""
    power = 1e-9
    while power < value:
        power *= 10
    return f"{power:.0e}"
