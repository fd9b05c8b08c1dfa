"""Memory that is used over and over and given back whole."""

from __future__ import annotations

import mmap


def scratch(n_bytes: int) -> memoryview:
    """``n_bytes`` of zeroed memory that the system has back once nobody refers to it.

    With malloc, small things that live longer are put where a buffer was, so the next buffer needs
    new memory: a conversion of 70B to 8 of Meta's files came to 490 MB so, and takes 210 now.
    """
    return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE))[:n_bytes]
