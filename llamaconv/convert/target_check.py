"""Check that a target may and can be written: before anything is, and again once it is locked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llamaconv.checkpoint.tensors import Location
from llamaconv.convert import journal
from llamaconv.convert.partial import is_ours
from llamaconv.report.errors import RefusedError, first_few

SUFFIX = ".llamaconv-partial"
_RECEIPT, _METADATA = "llamaconv.json", ".metadata"


def check_target(
    target: Path, source: Location, needed_bytes: int, overwrite: bool, fingerprint: str
) -> None:
    """Check the target of a conversion.

    Args:
        target: The folder to write.
        source: The source; a local one must not contain it, nor be inside it.
        needed_bytes: Bytes to write.
        overwrite: Whether a checkpoint at ``target`` may be replaced.
        fingerprint: That of the conversion: what an earlier run of it left needs no more space.

    Raises:
        RefusedError: It must not or cannot be written.
    """
    if isinstance(source, Path):
        _check_apart(target, source)
    check_existing(target, overwrite)
    for above in target.absolute().parents:
        if above.exists() and not above.is_dir():
            raise RefusedError(f"{above}: a file, not a folder. Choose another target")
    parent = _existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedError(f"{parent}: no permission to write here. Choose another target")
    needed_bytes -= journal.kept_bytes(partial_of(target), fingerprint)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RefusedError(
            f"{parent}: {needed_bytes:,} bytes must be written, {free:,} are free. "
            "Free some space or choose another target"
        )


def _check_apart(target: Path, source: Path) -> None:
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise RefusedError(
            f"{target}: the target must not be inside the source, nor the source inside the target"
        )


def check_existing(target: Path, overwrite: bool) -> None:
    """Raise `RefusedError` if ``target`` exists and must not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise RefusedError(f"{target}: not a folder. Choose another target")
    names = [entry.name for entry in target.iterdir()]
    if not names:
        return
    if not overwrite:
        raise RefusedError(f"{target}: exists already. Choose another target, or pass --overwrite")
    # Overwriting deletes the folder, so it must be a checkpoint and nothing else.
    others = [name for name in sorted(names) if not is_ours(name)]
    if others or not {_METADATA, _RECEIPT} & set(names):
        raise RefusedError(
            f"{target}: --overwrite replaces only checkpoints, and this folder also contains: "
            f"{first_few(others or names)}. Choose another target"
        )


def partial_of(target: Path) -> Path:
    """Return the folder next to ``target`` in which it is built."""
    return target.with_name(target.name + SUFFIX)


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.absolute().parents if parent.is_dir())
