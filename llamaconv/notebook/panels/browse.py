"""The panels of notebook 1: the table of tensors and its filters, the tree, a tensor's histogram."""

from __future__ import annotations

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.notebook import browse, figures
from llamaconv.notebook.panels.panel import Choice, HasHtml, Panel, Text
from llamaconv.notebook.tree import tree as tree_of
from llamaconv.report.errors import printable
from llamaconv.report.tables import Sentence


def tensors(checkpoint: Checkpoint, most: int = 20) -> Panel:
    """Return the table of tensors, with filters for kind, layer, file, dtype and name.

    Only values that occur are offered.

    Args:
        checkpoint: The checkpoint.
        most: The largest number of rows shown.
    """
    names = checkpoint.tensors
    found = {browse.kind_of(name, checkpoint.naming) for name in names}
    layers = [("outside the layers", browse.NO_LAYER)]
    return Panel(
        lambda **filters: browse.tensor_table(checkpoint, **filters, most=most),
        kind=_one_of("kind", [(kind, kind) for kind in browse.KINDS if kind in found]),
        layer=_one_of("layer", [*layers, *((str(n), n) for n in browse.layers_of(checkpoint))]),
        shard=_one_of("file", [(printable(file), file) for file in browse.files_of(checkpoint)]),
        dtype=_one_of("dtype", [(one, one) for one in sorted({t.dtype for t in names.values()})]),
        text=Text("name contains", placeholder="words, such as: mlp weight"),
    )


def tree(checkpoint: Checkpoint) -> Panel:
    """Return the tree of the tensors, with a search; found tensors are unfolded."""
    return Panel(
        lambda text: tree_of(checkpoint, text),
        text=Text("name contains", placeholder="words, such as: layers.3 q_proj"),
    )


def histogram(checkpoint: Checkpoint) -> Panel:
    """Return the histogram of one tensor, which is read when it is chosen."""

    def view(tensor: str) -> HasHtml:
        from llamaconv.notebook import weights  # imports torch

        found = weights.histogram(checkpoint, tensor)
        return found if isinstance(found, Sentence) else figures.histogram(found)

    names = [one.name for one in browse.in_order(checkpoint)] or [""]
    first = next(
        (name for name in names if name.endswith(("q_proj.weight", "wq.weight"))), names[0]
    )
    options = [(printable(name), name) for name in names]
    return Panel(view, tensor=Choice("tensor", options, first))


def _one_of(label: str, options: list[tuple[str, object]]) -> Choice:
    return Choice(label, ((browse.ALL, browse.ALL), *options), browse.ALL)
