"""Damage on purpose: what the checks say of a copy that one bit or one row is wrong in.

A check that cannot fail tells nothing, so notebook 5 lets each of them fail once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llamaconv import keys
from llamaconv.formats.detect import open_checkpoint
from llamaconv.opened import Checkpoint
from llamaconv.pieces import DTYPE_BYTES, TensorInfo
from llamaconv.problems import RefusedError
from llamaconv.receipt_check import verify_receipt
from llamaconv.tables import Table, size
from llamaconv.verify import verify_checkpoint

# A copy of the target is made for each damage.
MOST_BYTES = 64_000_000


def flip_one_bit(folder: Path) -> str:
    """The lowest bit of one element of a feed-forward matrix; returns the tensor's name."""
    tensor = _tensor(open_checkpoint(folder), "w2")
    piece = tensor.pieces[0]
    with open(piece.local_file, "r+b") as file:
        file.seek(piece.offset)
        byte = file.read(1)[0]
        file.seek(piece.offset)
        file.write(bytes([byte ^ 1]))
    return tensor.name


def exchange_two_rows(folder: Path) -> str:
    """The first two rows of one head of q; returns the tensor's name."""
    tensor = _tensor(open_checkpoint(folder), "wq")
    piece = tensor.pieces[0]
    row = DTYPE_BYTES[tensor.dtype] * piece.shape[1]
    with open(piece.local_file, "r+b") as file:
        file.seek(piece.offset)
        first, second = file.read(row), file.read(row)
        file.seek(piece.offset)
        file.write(second + first)
    return tensor.name


DAMAGES: dict[str, Callable[[Path], str]] = {
    "one bit flipped": flip_one_bit,
    "two rows of a head exchanged": exchange_two_rows,
}


def catch(source: str | Path, target: str | Path) -> Table:
    """Each of `DAMAGES` done to a copy of ``target``, and which checks fail.

    No rows but a sentence where the target is too large to be copied for this.
    """
    columns = ("damage", "tensor", "checks against the source that fail", "of the receipt alone")
    n_bytes = open_checkpoint(target).total_bytes
    if n_bytes > MOST_BYTES:
        caption = f"left out: copies are damaged up to {size(MOST_BYTES)}, this has {size(n_bytes)}"
        return Table(columns, [], caption=caption)
    rows = []
    for words, damage in DAMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(target, Path(folder) / "copy"))
            where = damage(copy)
            failed = [c.name for c in verify_checkpoint(source, copy).checks if not c.ok]
            alone = [c.name for c in verify_receipt(copy).checks if not c.ok]
        rows.append((words, where, ", ".join(failed) or "NOTHING", ", ".join(alone) or "NOTHING"))
    return Table(columns, rows)


def _tensor(checkpoint: Checkpoint, role: str) -> TensorInfo:
    """The first tensor of a role."""
    for name, tensor in checkpoint.tensors.items():
        known = keys.identify(name, checkpoint.naming)
        if known and known[0].name == role:
            return tensor
    raise RefusedError(f"{checkpoint.path}: has no {role}, so it cannot be damaged there")
