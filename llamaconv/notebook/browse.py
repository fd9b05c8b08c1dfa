"""What a checkpoint holds, as tables: kinds of tensors, totals, tensors, problems.

Works on headers alone and without torch.
"""

from __future__ import annotations

import re
from dataclasses import fields
from math import prod
from typing import get_args

from llamaconv.checkpoint import model_order
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.huggingface_index import index_diff as index_diff
from llamaconv.checkpoint.huggingface_index import without_path
from llamaconv.checkpoint.tensors import DTYPE_BYTES, TensorInfo
from llamaconv.model.names import Kind, identify
from llamaconv.model.params import RopeScaling
from llamaconv.model.published import closest_published as closest_published
from llamaconv.model.published import published as published
from llamaconv.report.tables import Sentence as Sentence
from llamaconv.report.tables import Table, size
from llamaconv.sample import write_sample as write_sample

ALL = "all"
"""The value of a filter that keeps everything."""

NO_LAYER = "none"
"""The layer of tensors outside the layers: embedding, last norm, head."""

OTHER = "other"
"""The kind of tensors that a Llama does not have."""

KINDS: tuple[str, ...] = (*get_args(Kind), OTHER)
"""All kinds, in the order of pictures and tables."""


def kind_of(name: str, naming: str | None) -> str:
    """Return the kind of a tensor, one of `KINDS`.

    Args:
        name: The tensor's name.
        naming: The naming scheme; with None, every name is `OTHER`.
    """
    known = identify(name, naming)
    return known[0].kind if known else OTHER


def layer_of(name: str, naming: str | None) -> int | None:
    """Return the layer of a tensor; None outside the layers and for unknown names."""
    known = identify(name, naming)
    return known[1] if known else None


def in_order(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Return the tensors in the order of a forward pass, unknown names last."""
    return model_order.in_order(checkpoint.tensors.values(), checkpoint.naming)


def files_of(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the files that hold tensors, by number: ``__2`` before ``__10``."""
    found = {file for tensor in checkpoint.tensors.values() for file in tensor.files}
    return sorted(found, key=_by_number)


def _by_number(file: str) -> tuple[list[str | int], str]:
    # Text and numbers alternate, so that like is compared with like; the name decides ties.
    parts = re.split(r"([0-9]{1,18})", file)
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], file


def bytes_by_file(checkpoint: Checkpoint) -> dict[str, dict[str, list[int]]]:
    """Return, for each file and kind, the bytes of each piece in the order of `in_order`."""
    found: dict[str, dict[str, list[int]]] = {
        file: {kind: [] for kind in KINDS} for file in files_of(checkpoint)
    }
    for tensor in in_order(checkpoint):
        kind, item = kind_of(tensor.name, checkpoint.naming), DTYPE_BYTES[tensor.dtype]
        for piece in tensor.pieces:
            found[piece.file.name][kind].append(prod(piece.shape) * item)
    return found


def totals(checkpoint: Checkpoint) -> Table:
    """Return one row per kind that occurs, and one for all: tensors, elements, bytes, dtypes."""
    by_kind: dict[str, list[TensorInfo]] = {kind: [] for kind in KINDS}
    for tensor in checkpoint.tensors.values():
        by_kind[kind_of(tensor.name, checkpoint.naming)].append(tensor)
    by_kind = {kind: tensors for kind, tensors in by_kind.items() if tensors}
    by_kind["all"] = list(checkpoint.tensors.values())
    rows = []
    for kind, tensors in by_kind.items():
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        rows.append(
            (
                kind,
                f"{len(tensors):,}",
                f"{sum(prod(tensor.shape) for tensor in tensors):,}",
                size(n_bytes),
                f"{n_bytes / (checkpoint.total_bytes or 1):.1%}",
                ", ".join(sorted({tensor.dtype for tensor in tensors})),
            )
        )
    columns = ("kind", "tensors", "elements", "size", "share", "dtype")
    return Table(columns, rows, right=columns[1:5])


def model_table(checkpoint: Checkpoint) -> Table | Sentence:
    """Return the model's parameters, or say that they could not be read."""
    params = checkpoint.params
    if params is None:
        return Sentence("The model's parameters could not be read; see the problems.")
    rows = [
        (field.name, _text(value))
        for field in fields(params)
        # Few models have a window or another kind of RoPE.
        if (value := getattr(params, field.name)) or field.name not in ("window", "rope_entry")
    ]
    return Table(("parameter", "value"), rows, right=("value",))


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, RopeScaling):
        return ", ".join(f"{one.name} {_text(getattr(value, one.name))}" for one in fields(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    # 1e-05, but 500000 and not 5e+05.
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def layers_of(checkpoint: Checkpoint) -> list[int]:
    """Return the numbers of the layers that have tensors."""
    found = {layer_of(name, checkpoint.naming) for name in checkpoint.tensors}
    return sorted(layer for layer in found if layer is not None)


def tensor_table(
    checkpoint: Checkpoint,
    kind: str = ALL,
    layer: int | str = ALL,
    shard: str = ALL,
    dtype: str = ALL,
    text: str = "",
    most: int = 60,
) -> Table:
    """Return one row per tensor that passes every filter.

    Args:
        checkpoint: The checkpoint.
        kind: One of `KINDS`, or `ALL`.
        layer: A number, `NO_LAYER` or `ALL`.
        shard: The name of a file, or `ALL`.
        dtype: A dtype, or `ALL`.
        text: Words that the name must contain, upper or lower case.
        most: The largest number of rows shown; the caption counts all.
    """
    words = text.lower().split()
    rows, n_bytes = [], 0
    for tensor in in_order(checkpoint):
        its_kind = kind_of(tensor.name, checkpoint.naming)
        its_layer = layer_of(tensor.name, checkpoint.naming)
        if (
            kind in (ALL, its_kind)
            and layer in (ALL, NO_LAYER if its_layer is None else its_layer)
            and (shard == ALL or shard in tensor.files)
            and dtype in (ALL, tensor.dtype)
            and all(word in tensor.name.lower() for word in words)
        ):
            n_bytes += tensor.nbytes
            rows.append(_row(tensor, its_kind))
    columns = ("tensor", "kind", "dtype", "shape", "size", "file")
    caption = f"{len(rows):,} of {len(checkpoint.tensors):,} tensors, {size(n_bytes)}"
    return Table(columns, rows, caption=caption, right=("shape", "size"), most=most)


def _row(tensor: TensorInfo, kind: str) -> tuple[str, ...]:
    shape = " × ".join(map(str, tensor.shape))
    return (
        tensor.name,
        kind,
        tensor.dtype,
        shape,
        size(tensor.nbytes),
        model_order.where(tensor.files),
    )


def ignored(checkpoint: Checkpoint) -> Table | Sentence:
    """Return the files and tensors that are skipped on purpose, and why."""
    if not checkpoint.ignored:
        return Sentence("Nothing is ignored: every tensor of every weight file is used.")
    return Table(("ignored", "why"), [(one.name, one.reason) for one in checkpoint.ignored])


def problem_table(checkpoint: Checkpoint) -> Table | Sentence:
    """Return the problems: first the errors, which stop a conversion, then the warnings."""
    if not checkpoint.problems:
        return Sentence("No problems were found.")
    found = sorted(checkpoint.problems, key=lambda one: one.level != "error")
    rows = [(one.level, without_path(checkpoint.folder, one.message)) for one in found]
    return Table(("level", "problem"), rows)
