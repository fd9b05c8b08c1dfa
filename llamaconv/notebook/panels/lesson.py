"""The panels of notebook 3: figures of the lesson with their controls."""

from __future__ import annotations

from llamaconv.notebook import figures, lesson
from llamaconv.notebook.lesson import Specimen
from llamaconv.notebook.panels.panel import Choice, Panel, Slider

# A head of this size is followed whatever the specimen, so that the lesson's numbers hold.
_FOLLOWED_HEAD = 32


def rotated_pairs(specimen: Specimen, position: int = 12) -> Panel:
    """Return some pairs of one head as points; choose the position that they are rotated to."""
    last = 24
    rotated = lesson.rotated_pairs(specimen, last + 1)
    return Panel(
        lambda position: figures.rotation(rotated, position),
        position=Slider("position", 0, last, position),
    )


def followed_row(row: int = 17) -> Panel:
    """Return the reordering of one head; choose the row to follow."""
    return Panel(
        lambda row: figures.follow_row(row, _FOLLOWED_HEAD),
        row=Slider("row of the head", 0, _FOLLOWED_HEAD - 1, row),
    )


def score_maps(specimen: Specimen) -> Panel:
    """Return the scores in both layouts; choose the head."""
    return Panel(
        lambda head: figures.score_maps(lesson.agreement(specimen, head)),
        head=Choice("head", range(specimen.params.n_heads), 0),
    )


def attention_maps(specimen: Specimen, layer: int = 1, head: int = 0) -> Panel:
    """Return the attention of every variant; choose layer and head.

    In the sample, head 0 of layer 1 looks at the previous position, whatever byte is there.
    """
    params = specimen.params
    return Panel(
        lambda layer, head: figures.attention_maps(lesson.attention_maps(specimen, layer, head)),
        layer=Choice("layer", range(params.n_layers), min(layer, params.n_layers - 1)),
        head=Choice("head", range(params.n_heads), min(head, params.n_heads - 1)),
    )


def scaling_mismatch() -> Panel:
    """Return the error of a wrong scaling by distance; choose the two releases.

    A dashed line shows the error of the wrong layout, for comparison.
    """
    layout = lesson.layout_mismatch()
    return Panel(
        lambda trained, run: figures.mismatch_by_distance(lesson.mismatch(trained, run), layout),
        trained=Choice("trained as", tuple(lesson.LLAMAS), "Llama 3.2"),
        run=Choice("run as", tuple(lesson.LLAMAS), "Llama 3.1"),
    )
