"""Compare two checkpoints of any formats, namings and layouts, tensor by tensor.

Tensors are matched by role and layer, unknown ones by name. Rows of q and k are brought to the
layout of the first checkpoint, by the index arithmetic of `bits_and_scores`. Both sides are read,
a window of rows at a time, so memory does not grow with the model.

Values of one dtype are equal if their bits are; of two dtypes, if the numbers are. How a model is
stored (names, files, layout, dtype) is reported, and is no difference of the model.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.torch_rows import TensorBuffer, read_rows
from llamaconv.model.names import ROLES
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import RefusedError
from llamaconv.report.progress import Progress, no_progress
from llamaconv.verify.bits_and_scores import (
    WINDOW_BYTES,
    count_different,
    rows_in_other_layout,
)
from llamaconv.verify.compared import Compared, Pair
from llamaconv.verify.sides import Place, Side, open_sides


def compare_checkpoints(
    one: str | Path, other: str | Path, progress: Progress | None = None, assets: str = ""
) -> Compared:
    """Compare the values and the description of two checkpoints.

    Args:
        one: A local checkpoint of any format.
        other: Another one.
        progress: Called with "read", the bytes read so far, and all bytes to read.
        assets: A folder with config.json, as for `open_sides`.

    Returns:
        What differs. Damaged tensors are in it too, with the reason.

    Raises:
        RefusedError: A side cannot be opened or is on the Hub; the number of heads is needed and
            neither side states it; or the two have no tensor in common.
        FailedError: A file cannot be read.
    """
    sides, notes = open_sides(one, other, assets)
    a, b = sides
    places = [place for place in a.tensors if place in b.tensors]
    head_dim = _head_dim(a.checkpoint, b.checkpoint)
    if head_dim:
        notes.append(f"q and k rows of the second were reordered to {a.checkpoint.rope}")
    total = sum(side.tensors[place].nbytes for side in sides for place in places)
    windows = _Windows(progress or no_progress, total)
    with PieceReader() as reader:
        pairs = [
            _compare(reader, place, a.tensors[place], b.tensors[place], head_dim, b, windows)
            for place in places
        ]
    return Compared(
        paths=(str(one), str(other)),
        pairs=tuple(pairs),
        only=(_lacking(a, b), _lacking(b, a)),
        description=_described(a.stated, b.stated),
        notes=tuple(notes),
        errors=tuple(error for side in sides for error in side.checkpoint.errors),
    )


def _head_dim(one: Checkpoint, other: Checkpoint) -> int | None:
    """Return the rows per head if rows must be reordered; else None."""
    if None in (one.rope, other.rope) or one.rope == other.rope:
        return None
    if one.params is None:
        raise RefusedError(
            f"{one.path} and {other.path}: their q and k rows are in different layouts, and no file "
            "states the number of heads. Pass a folder with the model's config.json with --assets"
        )
    return one.params.head_dim


def _described(
    one: LlamaParams | None, other: LlamaParams | None
) -> dict[str, tuple[object, object]]:
    # A DCP without a receipt states nothing, which is no difference.
    return {} if one is None or other is None else one.differences(other)


def _lacking(side: Side, there: Side) -> tuple[str, ...]:
    return tuple(
        tensor.name for place, tensor in side.tensors.items() if place not in there.tensors
    )


class _Windows:
    """Memory for windows of both sides, and the count of the bytes read."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.one, self.other = TensorBuffer(), TensorBuffer()
        self._progress, self._total, self._done = progress, total, 0

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress("read", self._done, self._total)


def _compare(
    reader: PieceReader,
    place: Place,
    one: TensorInfo,
    other: TensorInfo,
    head_dim: int | None,
    b: Side,
    windows: _Windows,
) -> Pair:
    role = ROLES.get(place[0])
    unit = head_dim if head_dim and role is not None and role.heads else 1
    pair = Pair(
        role=place[0] if role else "",
        layer=place[1],
        names=(one.name, other.name),
        dtypes=(one.dtype, other.dtype),
        shapes=(one.shape, other.shape),
    )
    if reason := _why_not(one, other, unit):
        windows.add(one.nbytes + other.nbytes)
        return replace(pair, reason=reason)
    n_different, largest, squares = 0, 0.0, 0.0
    for first, last in one.windows(WINDOW_BYTES, unit):
        left = read_rows(reader, one, first, last, windows.one)
        right = read_rows(reader, other, first, last, windows.other)
        if unit > 1:
            order = rows_in_other_layout(last - first, unit, b.checkpoint.rope)
            right = right.index_select(0, order)
        same_dtype = left.dtype == right.dtype
        different = count_different(left, right) if same_dtype else -1
        if different:
            apart = _difference(_wide(left), _wide(right))
            n_different += int(torch.count_nonzero(apart)) if different < 0 else different
            largest = max(largest, _number(apart.abs().max()))
            squares += _norm(apart) ** 2
        windows.add((last - first) * (one.row_bytes + other.row_bytes))
    relative = 0.0
    if squares:
        # Read again, because most tensors do not differ, and a norm takes longer than their bits.
        own = sqrt(
            sum(
                _norm(_wide(read_rows(reader, one, first, last, windows.one))) ** 2
                for first, last in one.windows(WINDOW_BYTES)
            )
        )
        relative = sqrt(squares) / own if own else float("inf")
    # inf - inf, and NaN, are as far apart as can be.
    relative = relative if isfinite(relative) else float("inf")
    return replace(pair, n_different=n_different, largest=largest, relative=relative)


def _why_not(one: TensorInfo, other: TensorInfo, unit: int) -> str:
    """Return why the values of two tensors cannot be compared; empty if they can."""
    if one.shape != other.shape:
        return "other shape"
    if one.shape and one.shape[0] % unit:
        return "not whole heads"
    return next((why for tensor in (one, other) if (why := tensor.coverage_error())), "")


def _wide(values: Tensor) -> Tensor:
    """Return ``values`` as float32, or float64 if float32 cannot hold them."""
    if values.is_complex():
        values = torch.view_as_real(values)
    is_narrow = values.is_floating_point() and values.dtype.itemsize <= 4
    return values.to(torch.float32 if is_narrow else torch.float64)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Return ``other - one``; 0 where both are the same infinity, or both NaN."""
    apart = other - one
    if not torch.isfinite(apart).all():
        apart[(one == other) | (one.isnan() & other.isnan())] = 0
    return apart


def _norm(values: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values))
    # The squares of large numbers overflow in float32.
    return norm if isfinite(norm) else float(torch.linalg.vector_norm(values.double()))


def _number(value: Tensor) -> float:
    number = float(value)
    return number if isfinite(number) else float("inf")
