"""Memory that is used over and over and given back whole."""

from __future__ import annotations

import mmap


def scratch(n_bytes: int) -> memoryview:
    """``n_bytes`` of zeroed memory that the system has back once nobody refers to it.

    With malloc, small things that live longer are put where a buffer was, so the next buffer needs
    new memory: a conversion of 70B to 8 of Meta's files came to 490 MB so, and takes 210 now.
    """
    return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE))[:n_bytes]


class Reused:
    """Scratch memory for one thing at a time, the same memory again and again."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, n_bytes: int) -> memoryview:
        """``n_bytes`` of it, with whatever was there; what was taken before is not valid any more."""
        if len(self._memory) < n_bytes:
            self._memory = scratch(n_bytes)
        return self._memory[:n_bytes]
