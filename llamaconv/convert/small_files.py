"""Write the small files next to the weights."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamaconv.checkpoint.buffers import scratch
from llamaconv.checkpoint.digests import difference, hasher
from llamaconv.checkpoint.fetch_ahead import RANGE_BYTES
from llamaconv.checkpoint.folder import RemoteFolder
from llamaconv.checkpoint.receipt import NAME, Receipt
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import Location
from llamaconv.checkpoint.untrusted.files import open_file
from llamaconv.convert.destination import Destination
from llamaconv.report.errors import FailedError


def copy_file(source: Path, target: Destination, name: str) -> None:
    """Copy a file's content to a new file ``name``. Raises ``OSError``."""
    with open_file(source) as read, target.create(name) as written:
        shutil.copyfileobj(read, written)


def fetch_file(
    source: RemoteFile,
    repository: RemoteFolder,
    target: Destination,
    name: str,
    stop: threading.Event,
) -> None:
    """Fetch a file of a repository to a new file ``name``, if it has the digest listed.

    Raises:
        FailedError: It cannot be fetched, or has other bytes; or ``stop`` was set.
        OSError: The disk failed.
    """
    n_bytes = repository.files[source.name]
    digest = repository.digests.get(source.name)
    found = hasher(digest, n_bytes) if digest else None
    buffer = scratch(min(n_bytes, RANGE_BYTES))
    assert source.ranges is not None
    with target.create(name) as written:
        for first in range(0, n_bytes, RANGE_BYTES):
            block = buffer[: n_bytes - first]
            source.ranges.read_into(source.name, first, block, stop)
            written.write(block)
            if found:
                found.update(block)
        why = difference(digest, found.hexdigest(), repository.path) if digest and found else ""
        if why:
            raise FailedError(f"{source}: {why}. Run the same command again")


def copy_small_files(
    target: Destination,
    files: Mapping[str, Location],
    repository: RemoteFolder | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Copy ``files`` to their paths in ``target``; those of ``repository`` are fetched together.

    Raises:
        FailedError: A file cannot be fetched, or ``stop`` was set meanwhile.
        OSError: The disk failed.
    """
    with ThreadPoolExecutor(8) as pool:
        jobs = []
        for name, source in files.items():
            if isinstance(source, Path):
                copy_file(source, target, name)
            else:
                assert repository is not None and stop is not None
                jobs.append(pool.submit(fetch_file, source, repository, target, name, stop))
        for job in jobs:
            job.result()


def put_text(target: Destination, name: str, text: str) -> None:
    """Write ``text`` to a small file in UTF-8. Raises ``OSError``."""
    target.put(name, text.encode())


def write_receipt(target: Destination, receipt: Receipt) -> None:
    """Write ``llamaconv.json``."""
    text = json.dumps(receipt.to_json(), indent=1, ensure_ascii=True)
    put_text(target, NAME, text + "\n")
