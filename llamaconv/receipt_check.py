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
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import Checkpoint, Piece, TensorInfo
from llamaconv.problems import LlamaconvError, RefusedError, some

_BLOCK_BYTES = 4 << 20


def verify_receipt(target: str | Path, progress: Progress | None = None) -> Verification:
    """Checks the checkpoint at ``target`` against its own receipt.

    Raises `RefusedError` where there is no receipt, or no checkpoint.
    """
    found = open_checkpoint(target)
    if found.receipt is None:
        raise RefusedError(
            f"{target}: has no receipt (llamaconv.json); give the source too: llamaconv verify SRC DST"
        )
    structure = _check_structure(found)
    if not structure.ok:
        return Verification((structure,))
    try:
        return Verification(
            (structure, _check_digests(found, progress or (lambda done, total: None)))
        )
    except (LlamaconvError, OSError) as error:
        return Verification((structure, Check("digests", False, float("inf"), None, str(error))))


def _check_structure(found: Checkpoint) -> Check:
    assert found.receipt is not None
    wanted = {t["target"]: (t["dtype"], tuple(t["shape"])) for t in found.receipt["tensors"]}
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()}
    wrong = sorted(
        name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)
    )
    detail = f"{len(stored)} tensors with the receipt's names, shapes and dtypes"
    if wrong:
        detail = f"{len(wrong)} tensors are not as the receipt has them: {some(wrong)}"
    if found.errors:
        detail = "; ".join(problem.message for problem in found.errors[:3])
    ok = not wrong and not found.errors
    return Check("structure", ok, float(max(len(wrong), len(found.errors))), None, detail)


def _check_digests(found: Checkpoint, progress: Progress) -> Check:
    assert found.receipt is not None
    recorded = {entry["target"]: entry["digests"] for entry in found.receipt["tensors"]}
    wrong: list[str] = []
    mixed_up, done, before = 0, 0, [""]
    with PieceReader() as reader:
        for name, tensor in found.tensors.items():
            digests = []
            for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
                digests.append(_digest(reader, tensor, piece))
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
