"""Whether a target may and can be written: asked before anything is, and again once it is locked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llamaconv import journal
from llamaconv.formats.huggingface import ASSETS
from llamaconv.problems import RefusedError, some

SUFFIX = ".llamaconv-partial"
_RECEIPT, _METADATA = "llamaconv.json", ".metadata"
# What a checkpoint of ours consists of, beside weights; a folder with anything else is not
# replaced.
_OURS = {_RECEIPT, _METADATA, "config.json", "params.json", "model.safetensors.index.json"}
_OURS |= set(ASSETS)


def check_target(
    target: Path, source: Path, needed_bytes: int, overwrite: bool, fingerprint: str
) -> None:
    """Raises `RefusedError` where ``target`` must not or cannot be written.

    ``fingerprint`` is the conversion's: what an earlier run of the same left needs no more room.
    """
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise RefusedError(f"{target}: source and target must not lie in each other")
    check_existing(target, overwrite)
    for above in target.absolute().parents:
        if above.exists() and not above.is_dir():
            raise RefusedError(f"{above}: is a file, not a folder; choose another target")
    parent = _existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedError(f"{parent}: no permission to write here; choose another target")
    needed_bytes -= journal.kept_bytes(partial_of(target), fingerprint)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RefusedError(
            f"{parent}: {needed_bytes:,} bytes are to be written, {free:,} are free; "
            "free some space or choose another target"
        )


def check_existing(target: Path, overwrite: bool) -> None:
    """Raises `RefusedError` where something stands at ``target`` that must not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise RefusedError(f"{target}: is not a folder; choose another target")
    names = os.listdir(target)
    if not names:
        return
    if not overwrite:
        raise RefusedError(f"{target}: exists already; choose another target, or pass --overwrite")
    # Overwriting deletes the folder, so it has to be a checkpoint and nothing but one.
    strangers = [
        name
        for name in sorted(names)
        if name not in _OURS and not name.endswith((".distcp", ".safetensors", ".pth"))
    ]
    if strangers or not {_METADATA, _RECEIPT} & set(names):
        raise RefusedError(
            f"{target}: is not only a checkpoint, so --overwrite will not replace it "
            f"(found {some(strangers or names)}); choose another target"
        )


def partial_of(target: Path) -> Path:
    """The folder beside ``target`` in which it is built."""
    return target.with_name(target.name + SUFFIX)


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.absolute().parents if parent.is_dir())
