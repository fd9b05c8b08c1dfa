"""Rows of a tensor info as a torch tensor; `pieces` itself does without torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import TensorInfo
from llamaconv.scratch import Reused


class Window(Reused):
    """Memory for one tensor at a time."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are whatever was there; the one before it is not valid any more."""
        n_bytes = prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(tuple(shape), dtype=dtype)  # frombuffer takes no empty one
        return torch.frombuffer(self.take(n_bytes), dtype=dtype).view(*shape)


def read_rows(
    reader: PieceReader, info: TensorInfo, first: int, last: int, window: Window | None = None
) -> Tensor:
    """Rows ``first`` to ``last``, the last one excluded, in the dtype that is stored.

    Shape ``(last - first, *info.shape[1:])``, in memory of its own or in ``window``'s. Raises
    `FailedError` where a file ends early.
    """
    shape = (last - first, *info.shape[1:])
    window = window or Window()
    rows = window.tensor(shape, getattr(torch, info.dtype))
    reader.read_rows(info, first, last, window.take(rows.nbytes))
    return rows
