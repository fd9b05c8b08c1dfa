"""Rows of a tensor info as a torch tensor; `pieces` itself does without torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import TensorInfo


def read_rows(reader: PieceReader, info: TensorInfo, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last``, the last one excluded, in the dtype that is stored.

    Shape ``(last - first, *info.shape[1:])``. Raises `FailedError` where a file ends early.
    """
    shape, dtype = (last - first, *info.shape[1:]), getattr(torch, info.dtype)
    buffer = bytearray((last - first) * info.row_bytes)
    if not buffer:
        return torch.empty(shape, dtype=dtype)  # frombuffer takes no empty one
    reader.read_rows(info, first, last, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
