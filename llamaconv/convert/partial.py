"""What an unfinished conversion has put into a store: recognised, and removed. No torch.

While a conversion writes, ``.llamaconv-partial`` is next to its files. It says who writes, and is
put again every minute. Without it, or once nobody has put it again for a quarter of an hour, nobody
writes there.

The store was empty there before, so every file of a name that conversions give is the conversion's,
until the file is there that makes a checkpoint of them: then they are a checkpoint, and stay.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamaconv.plan.small_files import is_small_file

MARKER = ".llamaconv-partial"
BEAT_SECONDS = 60.0
"""Between two times that the marker is put."""
_STALE_SECONDS = 15 * 60.0
_RECEIPT, _METADATA = "llamaconv.json", ".metadata"
# What a checkpoint of ours has in addition to weights.
_OURS = {_RECEIPT, _METADATA, "config.json", "params.json", "model.safetensors.index.json"}
_WEIGHTS = (".distcp", ".safetensors", ".pth")


def is_ours(name: str) -> bool:
    """Return whether a conversion writes a file of this name, or a folder; a path is its first part."""
    first = name.partition("/")[0]
    return first in _OURS or is_small_file(first) or first.endswith(_WEIGHTS)


@dataclass(frozen=True)
class Marker:
    """Who writes to a folder of a store.

    Attributes:
        conversion: A random name of the conversion.
        last: The file that completes its checkpoint.
        host: The writing host.
        pid: The process there, rank 0.
        system: Tells the host's process numbers from those of another host or container; "" if
            the system does not say.
    """

    conversion: str
    last: str
    host: str
    pid: int
    system: str

    def content(self) -> bytes:
        """Return the content of the marker's file."""
        return json.dumps(asdict(self)).encode()


def own_marker(conversion: str, last: str) -> Marker:
    """Return the marker of a conversion of this process."""
    return Marker(conversion, last, socket.gethostname(), os.getpid(), _system())


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def read_marker(fs: Any, path: str) -> Marker | None:
    """Return the marker in a folder; None if there is none, or nothing that can be read.

    Raises what the driver raises.
    """
    try:
        content = fs.cat_file(f"{path}/{MARKER}")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(content[:4096])
        marker = Marker(**found)
        is_one = all(isinstance(value, str) for key, value in found.items() if key != "pid")
        return marker if is_one and type(marker.pid) is int else None
    except (ValueError, TypeError, RecursionError):
        return None


def is_abandoned(fs: Any, path: str, marker: Marker) -> bool:
    """Return whether nobody writes any more to a folder with ``marker``. Raises as the driver does."""
    if marker.system and marker.system == _system():
        try:
            os.kill(marker.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        # Its number may belong to another process by now: the time tells.
    info = fs.info(f"{path}/{MARKER}")
    # Not the time of creation: the marker is put again and again.
    for name in ("LastModified", "last_modified", "updated", "mtime"):
        when = info.get(name)
        if isinstance(when, str):
            with suppress(ValueError):
                when = datetime.fromisoformat(when)
        if isinstance(when, datetime):
            # Drivers that give no zone mean UTC.
            when = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        if isinstance(when, int | float):
            return time.time() - when > _STALE_SECONDS
    return False


def remove(
    fs: Any,
    path: str,
    marker: Marker,
    *,
    even_complete: bool,
    sent: Iterable[str] = (),
    is_last_pass: bool = True,
) -> bool:
    """Remove what a conversion has put into a folder: files, uploads, and at last its marker.

    Without its marker, what is there may be another's by now.

    Args:
        fs: The filesystem.
        path: The folder in it.
        marker: The conversion's. Nothing is removed if the folder has that of another.
        even_complete: Whether to remove a checkpoint that is complete, too.
        sent: What this process has put itself. That goes without a marker, too, unless there is a
            checkpoint.
        is_last_pass: Whether the marker goes, too.

    Returns:
        Whether the folder holds nothing of the conversion now, not counting a complete checkpoint.

    Raises what the driver raises.
    """
    fs.invalidate_cache()
    names = _names(fs, path)
    # Read after the files were listed: those of a conversion that begins now are not among them.
    there = read_marker(fs, path)
    if there is not None and there.conversion != marker.conversion:
        return True
    if marker.last in names and not (even_complete and there is not None):
        if there is not None:
            fs.rm_file(f"{path}/{MARKER}")
        return True
    known = set(sent)
    mine = [name for name in names if (is_ours(name) if there is not None else name in known)]
    # That which makes it a checkpoint goes first.
    _delete(fs, path, sorted(mine, key=lambda name: name != marker.last))
    if there is None:
        return True
    abort_uploads(fs, path)
    if is_last_pass:
        with suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{MARKER}")
    fs.invalidate_cache()
    return not any(is_ours(name) for name in _names(fs, path))


def _delete(fs: Any, path: str, names: Iterable[str]) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")


def _names(fs: Any, path: str) -> list[str]:
    begin = f"{path.rstrip('/')}/"
    try:
        found = fs.find(path)
    except FileNotFoundError:
        return []
    return [one[len(begin) :] for one in found if one.startswith(begin) and one != begin]


def abort_uploads(fs: Any, path: str) -> None:
    """Abort the unfinished uploads of a conversion, where the store keeps them until then.

    That is S3. Google's are forgotten after a week and cost nothing; Azure's blocks are, too. Call
    it while the marker of the conversion is there, so that nobody else's are aborted.
    """
    if not hasattr(fs, "abort_mpu"):
        return
    bucket, key, _ = fs.split_path(path)
    begin = f"{key.rstrip('/')}/" if key else ""
    further: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=begin, **further)
        for upload in page.get("Uploads", ()):
            name = upload["Key"].removeprefix(begin)
            if upload["Key"].startswith(begin) and "/" not in name and is_ours(name):
                with suppress(FileNotFoundError):
                    fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        if not page.get("IsTruncated"):
            return
        further = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page["NextUploadIdMarker"],
        }
