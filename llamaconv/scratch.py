"""Memory that is used over and over and given back whole."""

from __future__ import annotations

import mmap


def scratch(n_bytes: int) -> memoryview:
    """``n_bytes`` of zeroed memory that the system has back once nobody refers to it.

    From malloc, small things that outlive a buffer settle where it was, and the next one goes
    behind them: the memory of a conversion to 8 of Meta's files grew with their length, to 490 MB.
    """
    return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE))[:n_bytes]
