"""The results of a verification, as a picture."""

from __future__ import annotations

from llamaconv.notebook.figures.picture import Picture, drawing, label_ends, picture, run_look
from llamaconv.report.errors import first_few
from llamaconv.verify.results import SCORE_TOLERANCE, Verification


def score_errors(verification: Verification) -> Picture:
    """Draw the rotated-score error of each layer and its control, on a logarithmic scale."""
    errors = [max(error, 1e-9) for error, _ in verification.layers]
    control = [max(wrong, 1e-9) for _, wrong in verification.layers]
    layers = range(len(errors))
    with drawing(7.4, 3.2) as (figure, axes):
        for number, values in enumerate((errors, control)):
            axes.semilogy(layers, values, **run_look(number))
        axes.set_xlabel("layer")
        axes.set_ylabel("largest difference of\nrotated scores, relative")
        axes.set_ylim(1e-9, 30)
        axes.set_xticks(list(layers) if len(errors) <= 16 else list(layers)[:: len(errors) // 8])
        if errors:
            label_ends(axes, ["this conversion", "control: rows in\nthe other layout"])
        return picture(
            figure,
            _conclusion(errors, min(control, default=0.0)),
            "Attention scores with the rotation of each layout, at distances above 0. "
            f"Below {SCORE_TOLERANCE:g} is rounding.",
        )


def _conclusion(errors: list[float], least_control: float) -> str:
    if not errors:
        return "No scores were compared, because an earlier check failed."
    # nan is not below the tolerance.
    off = [str(layer) for layer, error in enumerate(errors) if not error <= SCORE_TOLERANCE]
    if off:
        return (
            f"The scores of the conversion differ from the source's in {len(off)} of {len(errors)} "
            f"layers ({first_few(off)}), like those of rows in the other layout."
        )
    return (
        "In every layer the scores of the conversion agree with the source's to better than "
        f"{_power_above(max(errors))}, while rows in the other layout are off by "
        f"{least_control:.1g} or more."
    )


def _power_above(value: float) -> str:
    """Return the power of ten just above, so that the text does not depend on the last bits."""
    power = 1e-9
    while power < value:
        power *= 10
    return f"{power:.0e}"
