"""What a checkpoint holds, as values to look at: kinds, totals, tensors, what is wrong.

Works on headers alone and without torch.
"""

from __future__ import annotations

import re
from dataclasses import fields
from math import prod
from typing import get_args

from llamaconv import keys
from llamaconv.index_diff import index_diff, without_path
from llamaconv.opened import Checkpoint
from llamaconv.params import RopeScaling
from llamaconv.pieces import DTYPE_BYTES, TensorInfo
from llamaconv.tables import Sentence, Table, size

__all__ = [
    "ALL",
    "KINDS",
    "NO_LAYER",
    "OTHER",
    "Sentence",
    "bytes_by_file",
    "files_of",
    "ignored",
    "in_order",
    "index_diff",
    "kind_of",
    "layer_of",
    "layers_of",
    "model_table",
    "problems",
    "tensor_table",
    "totals",
]

ALL = "all"
"""The choice of a filter that leaves everything in."""

NO_LAYER = "none"
"""The choice of the tensors that belong to no layer: embedding, last norm, head."""

OTHER = "other"
# In the order in which pictures and tables show them.
KINDS: tuple[str, ...] = (*get_args(keys.Kind), OTHER)
_ROLE_ORDER = {role: at for at, role in enumerate(keys.ROLES)}


def kind_of(name: str, naming: str | None) -> str:
    """One of `KINDS`; "other" for every name that is no Llama's in ``naming``."""
    known = keys.identify(name, naming)
    return known[0].kind if known else OTHER


def layer_of(name: str, naming: str | None) -> int | None:
    known = keys.identify(name, naming)
    return known[1] if known else None


def in_order(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The tensors as a forward pass meets them, unknown names last.

    Files list them by the alphabet, layer 10 before layer 2.
    """

    def place(tensor: TensorInfo) -> tuple[int, int, int, str]:
        known = keys.identify(tensor.name, checkpoint.naming)
        if known is None:
            return (3, 0, 0, tensor.name)
        role, layer = known
        if layer is not None:
            return (1, layer, _ROLE_ORDER[role.name], tensor.name)
        return (0 if role.name == "tok_embeddings" else 2, 0, _ROLE_ORDER[role.name], tensor.name)

    return sorted(checkpoint.tensors.values(), key=place)


def files_of(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that hold tensors, by the numbers in them: ``__2_0`` before ``__10_0``."""
    found = {file for tensor in checkpoint.tensors.values() for file in tensor.files}
    return sorted(found, key=_by_number)


def _by_number(file: str) -> tuple[list[str | int], str]:
    # Every second part is a number, so that like is compared with like; the name decides last.
    parts = re.split(r"([0-9]{1,18})", file)
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], file


def bytes_by_file(checkpoint: Checkpoint) -> dict[str, dict[str, list[int]]]:
    """For each file and kind the bytes of each of its pieces, in the order of `in_order`."""
    found: dict[str, dict[str, list[int]]] = {
        file: {kind: [] for kind in KINDS} for file in files_of(checkpoint)
    }
    for tensor in in_order(checkpoint):
        kind, item = kind_of(tensor.name, checkpoint.naming), DTYPE_BYTES[tensor.dtype]
        for piece in tensor.pieces:
            found[piece.file.name][kind].append(prod(piece.shape) * item)
    return found


def totals(checkpoint: Checkpoint) -> Table:
    """Tensors, elements, bytes and dtypes of each kind that is there, and of all."""
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
    """The model's parameters as they were read, or that there are none."""
    params = checkpoint.params
    if params is None:
        return Sentence("The model's parameters could not be read; see the problems.")
    rows = [(field.name, _text(getattr(params, field.name))) for field in fields(params)]
    return Table(("parameter", "value"), rows, right=("value",))


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, RopeScaling):
        return ", ".join(
            f"{field.name} {_text(getattr(value, field.name))}" for field in fields(value)
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    # 1e-05, but 500000 and not 5e+05.
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def layers_of(checkpoint: Checkpoint) -> list[int]:
    """Numbers of the layers that have a tensor."""
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
    """The tensors that fit every filter, ``most`` of them as rows.

    ``layer`` is a number, or `NO_LAYER` for tensors outside the layers. Each word of ``text``
    has to occur in the name, in upper or lower case.
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
    files = tensor.files
    where = files[0] if files else ""
    if len(files) > 1:
        where = f"{len(files)} files, {where} first"
    shape = " × ".join(map(str, tensor.shape))
    return (tensor.name, kind, tensor.dtype, shape, size(tensor.nbytes), where)


def ignored(checkpoint: Checkpoint) -> Table | Sentence:
    """Files and tensors that are left out on purpose, and why."""
    if not checkpoint.ignored:
        return Sentence("Nothing is ignored: every tensor of every weight file is used.")
    rows = [(one.name, one.reason) for one in checkpoint.ignored]
    return Table(("ignored", "why"), rows)


def problems(checkpoint: Checkpoint) -> Table | Sentence:
    """Errors, which a conversion would refuse, then warnings."""
    if not checkpoint.problems:
        return Sentence("No problem was found.")
    found = sorted(checkpoint.problems, key=lambda one: one.level != "error")
    rows = [(one.level, without_path(checkpoint.folder, one.message)) for one in found]
    return Table(("level", "what is wrong"), rows)
