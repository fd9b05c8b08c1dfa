"""The panels of notebook 3: each a figure of the lesson and what one chooses in it."""

from __future__ import annotations

from llamaconv import figures, lesson
from llamaconv.lesson import Specimen
from llamaconv.panels.panel import Choice, Panel, Slider

# The picture follows a row of a head as the small Llamas have it, whatever the specimen.
_FOLLOWED_HEAD = 32


def turning_pairs(specimen: Specimen, position: int = 12) -> Panel:
    """Pairs of one head as points; choose the position that they have turned to."""
    last = 24
    turned = lesson.turned_pairs(specimen, last + 1)
    return Panel(
        lambda position: figures.turning(turned, position),
        position=Slider("position", 0, last, position),
    )


def followed_row(row: int = 17) -> Panel:
    """The re-ordering of one head; choose the row to follow."""
    return Panel(
        lambda row: figures.follow_row(row, _FOLLOWED_HEAD),
        row=Slider("row of the head", 0, _FOLLOWED_HEAD - 1, row),
    )


def score_maps(specimen: Specimen) -> Panel:
    """Scores in both layouts; choose the head."""
    return Panel(
        lambda head: figures.score_maps(lesson.agreement(specimen, head)),
        head=Choice("head", range(specimen.params.n_heads), 0),
    )


def attention_maps(specimen: Specimen, layer: int = 1, head: int = 0) -> Panel:
    """Attention right and wrong; choose layer and head.

    In the sample, head 0 of layer 1 looks at the position before, whatever stands there.
    """
    params = specimen.params
    return Panel(
        lambda layer, head: figures.attention_maps(lesson.attention_maps(specimen, layer, head)),
        layer=Choice("layer", range(params.n_layers), min(layer, params.n_layers - 1)),
        head=Choice("head", range(params.n_heads), min(head, params.n_heads - 1)),
    )


def scaling_mismatch() -> Panel:
    """The error by distance; choose the Llama that was trained and the one that is run.

    Beside it, dashed, that of the wrong layout.
    """
    layout = lesson.layout_mismatch()
    return Panel(
        lambda trained, run: figures.mismatch_by_distance(lesson.mismatch(trained, run), layout),
        trained=Choice("trained as", tuple(lesson.LLAMAS), "Llama 3.2"),
        run=Choice("run as", tuple(lesson.LLAMAS), "Llama 3.1"),
    )
