"""Deliberate damage: which checks fail if one bit or one row of a target is wrong.

A check that cannot fail proves nothing, so notebook 5 makes each of them fail once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.tensors import DTYPE_BYTES, TensorInfo
from llamaconv.model.names import identify
from llamaconv.report.errors import RefusedError
from llamaconv.report.tables import Table, size
from llamaconv.verify.results import Verification
from llamaconv.verify.verify import verify_checkpoint

# The target is copied once per damage.
MOST_BYTES = 64_000_000


def flip_one_bit(folder: Path) -> str:
    """Flip the lowest bit of one element of a feed-forward matrix; return the tensor's name."""
    tensor = _first_of_role(folder, "w2")
    return _rewrite(tensor, 1, lambda old: bytes([old[0] ^ 1]))


def exchange_two_rows(folder: Path) -> str:
    """Exchange the first two rows of one head of q; return the tensor's name."""
    tensor = _first_of_role(folder, "wq")
    row = DTYPE_BYTES[tensor.dtype] * tensor.pieces[0].shape[1]
    return _rewrite(tensor, 2 * row, lambda old: old[row:] + old[:row])


def _rewrite(tensor: TensorInfo, count: int, change: Callable[[bytes], bytes]) -> str:
    """Change the first ``count`` bytes of a tensor; return its name."""
    piece = tensor.pieces[0]
    with piece.local_file.open("r+b") as file:
        file.seek(piece.offset)
        old = file.read(count)
        file.seek(piece.offset)
        file.write(change(old))
    return tensor.name


def _first_of_role(folder: Path, role: str) -> TensorInfo:
    checkpoint = split_fused(open_checkpoint(folder))
    for name, tensor in checkpoint.tensors.items():
        known = identify(name, checkpoint.naming)
        if known and known[0].name == role:
            return tensor
    raise RefusedError(f"{folder}: has no {role}, so it cannot be damaged there")


DAMAGES: dict[str, Callable[[Path], str]] = {
    "one bit flipped": flip_one_bit,
    "two rows of a head exchanged": exchange_two_rows,
}
"""Functions that damage a folder and return the name of the damaged tensor."""


def catch(source: str | Path, target: str | Path) -> Table:
    """Damage copies of ``target`` and return one row per damage: which checks fail.

    The table is empty, and its caption says why, if the target is too large to copy.

    Args:
        source: The checkpoint that the target was converted from.
        target: The converted checkpoint, which is not changed.

    Raises:
        RefusedError: The checkpoint has no tensor to damage.
    """
    columns = ("damage", "tensor", "failed checks against the source", "failed receipt checks")
    n_bytes = open_checkpoint(target).total_bytes
    if n_bytes > MOST_BYTES:
        caption = (
            f"skipped: this target has {size(n_bytes)}, and up to {size(MOST_BYTES)} are copied"
        )
        return Table(columns, [], caption=caption)
    rows = []
    for name, damage in DAMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(target, Path(folder) / "copy"))
            where = damage(copy)
            results = (verify_checkpoint(copy, source=source), verify_checkpoint(copy))
        rows.append((name, where, *map(_failed, results)))
    return Table(columns, rows)


def _failed(verification: Verification) -> str:
    return ", ".join(check.name for check in verification.checks if not check.ok) or "NONE"
