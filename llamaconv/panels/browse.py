"""The panel of notebook 1: the table of tensors and its filters."""

from __future__ import annotations

from llamaconv import browse
from llamaconv.opened import Checkpoint
from llamaconv.panels.panel import Choice, Panel, Text
from llamaconv.problems import printable


def tensors(checkpoint: Checkpoint, most: int = 20) -> Panel:
    """The checkpoint's tensors; choose kind, layer, file, dtype, and words of the name.

    Without widgets the first ``most`` rows. The choices offered are those that occur.
    """
    names = checkpoint.tensors
    found = {browse.kind_of(name, checkpoint.naming) for name in names}
    layers = browse.layers_of(checkpoint)
    dtypes = sorted({tensor.dtype for tensor in names.values()})
    files = browse.files_of(checkpoint)
    return Panel(
        lambda **filters: browse.tensor_table(checkpoint, **filters, most=most),
        kind=_one_of("kind", [(kind, kind) for kind in browse.KINDS if kind in found]),
        layer=_one_of(
            "layer", [("outside the layers", browse.NO_LAYER), *((str(n), n) for n in layers)]
        ),
        shard=_one_of("file", [(printable(file), file) for file in files]),
        dtype=_one_of("dtype", [(dtype, dtype) for dtype in dtypes]),
        text=Text("name has", placeholder="words, such as: mlp weight"),
    )


def _one_of(label: str, options: list[tuple[str, object]]) -> Choice:
    return Choice(label, ((browse.ALL, browse.ALL), *options), browse.ALL)
