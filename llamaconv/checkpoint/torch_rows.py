"""Rows of a tensor as a torch tensor; `tensors` and `reader` do without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from llamaconv.checkpoint.buffers import ReusableBuffer
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.tensors import TensorInfo


class TensorBuffer(ReusableBuffer):
    """Memory for one tensor at a time."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with arbitrary values. It is valid until the next call."""
        n_bytes = prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(tuple(shape), dtype=dtype)  # frombuffer refuses empty memory
        return torch.frombuffer(self.take(n_bytes), dtype=dtype).view(*shape)


def read_rows(
    reader: PieceReader, info: TensorInfo, first: int, last: int, window: TensorBuffer | None = None
) -> Tensor:
    """Read rows of a tensor, in its stored dtype.

    Args:
        reader: Reads the bytes; raises as its `PieceReader.read_rows` does.
        info: The tensor.
        first: The first row.
        last: The row after the last.
        window: Memory for the result; new memory if None.

    Returns:
        Shape ``(last - first, *info.shape[1:])``.
    """
    shape = (last - first, *info.shape[1:])
    window = window or TensorBuffer()
    rows = window.tensor(shape, getattr(torch, info.dtype))
    reader.read_rows(info, first, last, window.take(rows.nbytes))
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on the calling thread alone; restore its threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
