"""Addresses of object stores, such as ``s3://BUCKET/PREFIX``: every kind that fsspec knows.

This module knows the text of an address alone; `stores` connects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llamaconv.report.errors import RefusedError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
BUCKETS = "hf://buckets/"
"""Storage buckets of the Hugging Face Hub, which huggingface_hub has a filesystem for."""

# Local paths are given as paths, pages of the web cannot be listed, and a repository of the Hub is
# read by `hub`, at one commit. The others need the address of an archive or a cache behind them.
_NOT_STORES = frozenset(
    [
        "async_wrapper",
        "asynclocal",
        "blockcache",
        "cached",
        "data",
        "dir",
        "file",
        "filecache",
        "generic",
        "hf",
        "http",
        "https",
        "libarchive",
        "local",
        "reference",
        "simplecache",
        "tar",
        "zip",
    ]
)
_PASSWORD = re.compile(r"(?<=://)[^/]*:[^/]*(?=@)")
_QUERY = re.compile(r"\?[^/]*=.*")


@dataclass(frozen=True)
class StoreAddress:
    """A folder, or a file, in a store that fsspec can reach.

    Attributes:
        url: The address as it was given, without a slash at its end. It may contain a password:
            show ``str()`` of the address, never this.
    """

    url: str = field(repr=False)

    def __str__(self) -> str:
        return self.hide(self.url)

    def __truediv__(self, name: str) -> StoreAddress:
        return StoreAddress(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        """What the address begins with, such as ``s3``."""
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of the address."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> StoreAddress:
        """The folder that it is in; of a whole bucket, the address itself."""
        above = self.url.rpartition("/")[0]
        return self if above.endswith(("/", ":")) or not above else StoreAddress(above)

    def hide(self, text: str) -> str:
        """Return ``text``, which may quote the address, without passwords and signatures."""
        for secret in _PASSWORD.findall(self.url):
            text = text.replace(secret, "***")
        for secret in _QUERY.findall(self.url):
            text = text.replace(secret, "?***")
        return text


def store_address(text: str) -> StoreAddress | None:
    """Return the address that ``text`` is, or None if fsspec knows no store of this kind.

    Raises:
        RefusedError: It names no bucket.
    """
    found = SCHEME.match(text)
    if not found or "::" in text:
        return None
    if not text.startswith(BUCKETS) and found[1].lower() not in _schemes():
        return None
    if not (bare := text.removeprefix(found[0]).strip("/")) and found[1].lower() != "memory":
        raise RefusedError(f"{text}: names no bucket; an address is like {found[0]}BUCKET/FOLDER")
    return StoreAddress(f"{found[0]}{bare}")


def _schemes() -> frozenset[str]:
    """Return every scheme that fsspec knows, those of other packages included."""
    try:
        from fsspec.registry import available_protocols
    except ImportError:
        # torch brings fsspec. Whoever has neither is told by `stores` which one is missing.
        return frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"))
    return frozenset(available_protocols()) - _NOT_STORES
