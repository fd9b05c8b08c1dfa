"""A folder against its receipt alone: are these still the bytes that were written?

Every piece is read and its digest compared with the one the receipt has, so no source is needed
months later. It cannot say whether the conversion was right, only that nothing has changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xxhash

from llamaconv.checks import Check, Verification
from llamaconv.comparison import Progress
from llamaconv.formats.detect import open_checkpoint
from llamaconv.opened import Checkpoint
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import Piece, TensorInfo
from llamaconv.plan import Plan
from llamaconv.problems import LlamaconvError, RefusedError, some
from llamaconv.receipt import Receipt
from llamaconv.structure import check_structure

_BLOCK_BYTES = 4 << 20


def verify_receipt(target: str | Path, progress: Progress | None = None) -> Verification:
    """Checks the checkpoint at ``target`` against its own receipt.

    Raises `RefusedError` where there is no receipt, or no checkpoint.
    """
    found = open_checkpoint(target)
    if found.receipt is None:
        # One that is there and damaged is among the errors.
        reason = "has no receipt (llamaconv.json); give the source too: llamaconv verify SRC DST"
        raise RefusedError(found.errors or f"{target}: {reason}")
    return Verification(check_receipt(found, progress))


def check_receipt(
    found: Checkpoint, progress: Progress | None = None, digests: bool = True
) -> tuple[Check, ...]:
    """The checks of a target that has a receipt: its structure, and if that is right ``digests``."""
    structure = _check_structure(found)
    if not structure.ok or not digests:
        return (structure,)
    try:
        return structure, _check_digests(found, progress or (lambda done, total: None))
    except (LlamaconvError, OSError) as error:
        return structure, Check("digests", False, float("inf"), None, str(error))


def history_otherwise(receipt: Receipt, plan: Plan) -> list[str]:
    """What a receipt tells of the conversion and ``plan`` does not, a sentence each.

    Nothing where the plan's source is not the very folder that the receipt names: the same weights
    may lie elsewhere in another format.
    """
    source = plan.source
    if receipt.source.path != str(source.local_path.resolve()):
        return []
    wrong = [
        f"the source's {entry} is {told!r}, {value!r} expected"
        for entry, told, value in (
            ("format", receipt.source.format, source.format),
            ("rope", receipt.source.rope, source.rope),
        )
        if told != value
    ]
    told = {one.target: (one.source, one.operation) for one in receipt.tensors}
    wrong += [
        f"{move.writes}: {told[move.writes]} noted, {(move.source, move.operation)} expected"
        for move in plan.written
        if told[move.writes] != (move.source, move.operation)
    ]
    dropped = {move.source for move in plan.moves if move.target is None}
    if dropped != {entry.source for entry in receipt.dropped}:
        wrong.append(f"the dropped tensors are {some(sorted(dropped))}, others are noted")
    if receipt.params != plan.params:
        wrong.append("the parameters are not those of the source")
    return wrong


def _check_structure(found: Checkpoint) -> Check:
    assert found.receipt is not None
    expected = {one.target: (one.dtype, one.shape) for one in found.receipt.tensors}
    return check_structure(found, expected, found.receipt.params, "receipt")


def _check_digests(found: Checkpoint, progress: Progress) -> Check:
    assert found.receipt is not None
    recorded = {one.target: one.digests for one in found.receipt.tensors}
    wrong: list[str] = []
    mixed_up, done = 0, 0
    before: tuple[str, ...] = ("",)
    with PieceReader() as reader:
        for name, tensor in found.tensors.items():
            digests: tuple[str, ...] = ()
            for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
                digests += (_digest(reader, tensor, piece),)
                done += tensor.nbytes // len(tensor.pieces)
                progress(done, found.total_bytes)
            if digests != recorded[name]:
                wrong.append(name)
            # The yardstick: what would be seen had every tensor been given its neighbour's bytes.
            mixed_up += digests != before
            before = digests
    detail = f"{len(recorded)} tensors have the bytes that were written (xxh3-128)"
    if wrong:
        detail = f"{len(wrong)} tensors have changed since they were written: {some(wrong)}"
    return Check("digests", not wrong, float(len(wrong)), float(mixed_up), detail)


def _digest(reader: PieceReader, tensor: TensorInfo, piece: Piece) -> str:
    alone = replace(piece, start=(0,) * len(piece.shape))
    part = TensorInfo(tensor.name, tensor.dtype, piece.shape, (alone,))
    digest = xxhash.xxh3_128()
    if not part.nbytes:
        return digest.hexdigest()  # however many rows of no bytes its shape claims
    step = max(1, _BLOCK_BYTES // max(1, part.row_bytes))
    buffer = memoryview(bytearray(min(step, part.n_rows) * part.row_bytes))
    for first in range(0, part.n_rows, step):
        last = min(first + step, part.n_rows)
        block = buffer[: (last - first) * part.row_bytes]
        reader.read_rows(part, first, last, block)
        digest.update(block)
    return digest.hexdigest()
