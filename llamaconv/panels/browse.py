"""The panel of notebook 1: search and filter the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from llamaconv import browse
from llamaconv.panels.panel import Choice, Panel, Text
from llamaconv.pieces import Checkpoint


def tensors(checkpoint: Checkpoint) -> Panel:
    """The table of tensors; choose kind, layer, file and dtype, or a part of the name."""
    found = checkpoint.tensors.values()
    naming = checkpoint.naming
    kinds = {browse.kind_of(tensor.name, naming) for tensor in found}
    numbers = {browse.layer_of(tensor.name, naming) for tensor in found}
    layers = sorted(number for number in numbers if number is not None)
    files = sorted({file for tensor in found for file in tensor.files})
    dtypes = sorted({tensor.dtype for tensor in found})
    return Panel(
        lambda kind, layer, file, dtype, text: browse.tensor_table(
            checkpoint, kind, layer, file, dtype, text
        ),
        kind=Choice("kind", _all([k for k in browse.KINDS if k in kinds], ""), ""),
        layer=Choice("layer", _all(layers, None), None),
        file=Choice("file", _all(files, ""), ""),
        dtype=Choice("dtype", _all(dtypes, ""), ""),
        text=Text("name contains", placeholder="q_proj"),
    )


def _all(values: Sequence[object], nothing: object) -> list[tuple[str, object]]:
    """Pairs of text and value for a control whose first choice is no condition."""
    return [("all", nothing), *((str(value), value) for value in values)]
