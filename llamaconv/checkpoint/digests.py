"""Digests of whole files, as repositories of the Hub list them."""

from __future__ import annotations

import hashlib
from typing import Protocol

Digest = tuple[str, str]
"""Its kind ("sha256" of the bytes, or "git", the id of a blob), and its hexadecimal digits."""


class Hasher(Protocol):
    """A digest that grows with the bytes it is given."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""


def hasher(digest: Digest, n_bytes: int) -> Hasher:
    """Return what computes a digest of the kind of ``digest`` for a file of ``n_bytes``."""
    kind, expected = digest
    if kind == "sha256":
        return hashlib.sha256()
    # A repository of git's newer kind has longer ids.
    made = hashlib.new("sha1" if len(expected) == 40 else "sha256", usedforsecurity=False)
    made.update(b"blob %d\0" % n_bytes)
    return made


def difference(digest: Digest, found: str, whose: object) -> str:
    """Return why ``found`` is not the digest that ``whose`` lists, or ""."""
    kind, expected = digest
    if found == expected:
        return ""
    what = "sha256" if kind == "sha256" else "git blob id"
    return f"its {what} is {found[:16]}…, and {whose} lists {expected[:16]}…"
