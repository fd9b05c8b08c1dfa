"""How bytes reach a writer: the one shape of callback between the engine and every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

Blocks = Callable[[str, int, int], Iterator[memoryview]]
"""(tensor, first row, last row excluded) to the target's bytes of those rows, in order.

A block is valid until the next is asked for: its buffer is used again.
"""


def write_all(file: BinaryIO, view: memoryview) -> None:
    """All of ``view``, however little an unbuffered file takes at a time."""
    while len(view):
        view = view[file.write(view) :]
