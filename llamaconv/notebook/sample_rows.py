"""A few rows of one tensor, in the source and as the engine would write them.

Reads one head at most, so it is as fast for 405B as for the sample. The target's rows come from the
engine; nothing is reordered or cast in a second way here.

Shapes: R rows that are shown, N their first numbers (`COLUMNS` at most).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.tensors import WEIGHT_DTYPES, TensorInfo
from llamaconv.checkpoint.torch_rows import read_rows
from llamaconv.convert.engine import target_rows
from llamaconv.model import rope
from llamaconv.plan.plan import Move, Plan
from llamaconv.report.errors import FailedError, RefusedError
from llamaconv.report.tables import Table

COLUMNS = 16
"""How many numbers of a row are shown."""

ROWS = 16
"""How many rows are shown of a tensor without heads."""

# 64 times a head of the widest Llama (4 MiB). A header may claim any size.
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class SampleRows:
    """Some rows of one tensor, before and after.

    Attributes:
        move: The tensor's move in the plan.
        dtype: The source's dtype.
        first: The number of the first row.
        heads: How many heads the move reorders; None if rows keep their places.
        source: The source's rows (R, N), as float64.
        target: The target's rows (R, N), as float64.
        order: For each target row the source row that it is, both counted from ``first``.
    """

    move: Move
    dtype: str
    first: int
    heads: int | None
    source: torch.Tensor = field(repr=False)
    target: torch.Tensor = field(repr=False)
    order: tuple[int, ...]

    def table(self) -> Table:
        """Return the first four numbers of each row, source and target side by side."""
        rows = [
            (self.first + at, _numbers(self.source[at]), self.first + from_row, _numbers(after))
            for at, (from_row, after) in enumerate(zip(self.order, self.target, strict=True))
        ]
        columns = ("row", f"source, {self.dtype}", "source row", f"target, {self.move.dtype}")
        caption = f"{self.move.source} → {self.move.target}: {self.move.reason}"
        return Table(columns, rows, caption=caption, right=("row", "source row"))


def _numbers(row: torch.Tensor) -> str:
    return "  ".join(f"{value:+.3f}" for value in row[:4].tolist())


def sample_rows(plan: Plan, key: str, head: int = 0) -> SampleRows:
    """Read one head of a tensor, or its first rows if it has no heads.

    Args:
        plan: The plan.
        key: The tensor's name in the target.
        head: The number of the head.

    Raises:
        RefusedError: The plan does not write ``key``, the tensor has no such head, or the engine
            could not convert its rows.
        FailedError: A file was deleted or modified after it was opened.
    """
    move = next((move for move in plan.written if move.target == key), None)
    if move is None:
        raise RefusedError(f"{key}: the plan writes no such tensor")
    source = plan.source.tensors[move.source]
    first, last = _span(plan, move, source, head)
    n_bytes = (last - first) * source.row_bytes
    if not 0 < n_bytes <= _MOST_BYTES:
        raise RefusedError(
            f"{source.name}: the rows to show must have 1 to {_MOST_BYTES} bytes; got {n_bytes}"
        )
    if changed := plan.source.changed():
        raise FailedError(changed)
    with PieceReader() as reader:
        read = read_rows(reader, source, first, last)
    written = bytearray(b"".join(target_rows(plan, key, first, last)))
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
        target=_shown(torch.frombuffer(written, dtype=getattr(torch, move.dtype)).view(count, -1)),
        order=tuple(order.tolist()),
    )


def _span(plan: Plan, move: Move, source: TensorInfo, head: int) -> tuple[int, int]:
    """Return the rows to show, first included and last excluded."""
    if source.dtype not in WEIGHT_DTYPES:
        raise RefusedError(f"{source.name}: stored as {source.dtype}, which no weight has")
    if plan.source.rope is None:
        raise RefusedError(f"{source.name}: not part of a Llama model, so its rows have no layout")
    if not move.heads:
        return 0, min(ROWS, source.n_rows)
    if source.n_rows % (2 * move.heads):
        raise RefusedError(
            f"{source.name}: {source.n_rows} rows are not {move.heads} heads of an even size"
        )
    if not 0 <= head < move.heads:
        raise RefusedError(f"{source.name}: no head {head}; it has heads 0 to {move.heads - 1}")
    size = source.n_rows // move.heads
    return head * size, (head + 1) * size


def _shown(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(len(rows), -1)[:, :COLUMNS].double()
