"""A few rows of one tensor, before and after: what the engine makes of them, for eyes.

At most one head is read, so it is as quick for 405B as for the sample. The target's rows come
out of the engine that writes them; nothing is re-ordered or cast a second way here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llamaconv import rope
from llamaconv.engine import target_rows
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import WEIGHT_DTYPES, TensorInfo
from llamaconv.plan import Move, Plan
from llamaconv.problems import FailedError, RefusedError
from llamaconv.tables import Table
from llamaconv.torch_rows import read_rows

COLUMNS = 16
"""How many numbers of a row are shown."""

ROWS = 16
"""How many rows are shown of a tensor that has no heads."""

# Many times a head of the widest Llama (4 MiB); a header may claim any.
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, repr=False)
class SampleRows:
    """Rows ``first`` and on of one tensor: float64 [rows, `COLUMNS` at most], source and target.

    ``order`` names for each target row the source row that it is; both count from ``first``.
    ``heads`` is None where rows keep their places.
    """

    move: Move
    dtype: str
    first: int
    heads: int | None
    source: torch.Tensor
    target: torch.Tensor
    order: tuple[int, ...]

    def table(self) -> Table:
        """The first columns of each row as numbers, source and target side by side."""
        rows = [
            (self.first + at, _numbers(self.source[at]), self.first + from_row, _numbers(after))
            for at, (from_row, after) in enumerate(zip(self.order, self.target, strict=True))
        ]
        columns = ("row", f"source, {self.dtype}", "is source row", f"target, {self.move.dtype}")
        caption = f"{self.move.source} → {self.move.target}: {self.move.reason}"
        return Table(columns, rows, caption=caption, right=("row", "is source row"))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _numbers(row: torch.Tensor) -> str:
    return "  ".join(f"{value:+.3f}" for value in row[:4].tolist())


def sample_rows(plan: Plan, key: str, head: int = 0) -> SampleRows:
    """The rows of head ``head`` of the target ``key``, or the first rows where it has no heads.

    Raises `RefusedError` for a key that the plan does not write, for a head that is not there,
    and for a tensor whose rows the engine could not transform; `FailedError` where a file has
    gone or changed since its header was read.
    """
    move = next((move for move in plan.written if move.target == key), None)
    if move is None:
        raise RefusedError(f"{key}: the plan writes no such tensor")
    source = plan.source.tensors[move.source]
    first, last = _span(plan, move, source, head)
    if not 0 < (last - first) * source.row_bytes <= _MOST_BYTES:
        found = (last - first) * source.row_bytes
        raise RefusedError(f"{source.name}: the rows to show have {found} bytes, too few or many")
    if changed := plan.source.changed():
        raise FailedError(changed)
    with PieceReader() as reader:
        read = read_rows(reader, source, first, last)
    made = bytearray(b"".join(target_rows(plan, key, first, last)))
    count = last - first
    order = torch.arange(count)
    if move.heads and plan.source.rope:
        order = rope.relayout(order, 1, plan.source.rope, plan.target.layout)
    return SampleRows(
        move=move,
        dtype=source.dtype,
        first=first,
        heads=move.heads,
        source=_shown(read),
        target=_shown(torch.frombuffer(made, dtype=getattr(torch, move.dtype)).view(count, -1)),
        order=tuple(order.tolist()),
    )


def _span(plan: Plan, move: Move, source: TensorInfo, head: int) -> tuple[int, int]:
    if source.dtype not in WEIGHT_DTYPES:
        raise RefusedError(f"{source.name}: stored as {source.dtype}, which is no weight's dtype")
    if plan.source.rope is None:
        raise RefusedError(f"{source.name}: the names fit no Llama, so no row can be followed")
    if not move.heads:
        return 0, min(ROWS, source.n_rows)
    if source.n_rows % (2 * move.heads):
        raise RefusedError(
            f"{source.name}: {source.n_rows} rows are not {move.heads} heads of an even size"
        )
    if not 0 <= head < move.heads:
        raise RefusedError(f"{source.name}: head {head}; it has heads 0 to {move.heads - 1}")
    size = source.n_rows // move.heads
    return head * size, (head + 1) * size


def _shown(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(len(rows), -1)[:, :COLUMNS].double()
