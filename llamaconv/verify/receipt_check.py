"""Compare a checkpoint with its receipt: are these still the bytes that were written?

Every piece is read and its digest compared with the receipt's, so that no source is needed months
later. Other people's readers read the first rows of each tensor, and have to find the same.

Limit: this shows whether anything has changed, not whether the conversion was right.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from math import prod

import xxhash

from llamaconv.checkpoint.buffers import ReusableBuffer
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.receipt import Receipt
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.torch_rows import read_rows
from llamaconv.checkpoint.trainer_state import (
    TrainerState,
    read_trainer_state,
    with_optimizer,
)
from llamaconv.model.names import whole
from llamaconv.plan.plan import Plan
from llamaconv.report.errors import LlamaconvError, RefusedError, first_few
from llamaconv.report.progress import Progress, no_progress
from llamaconv.verify.bits_and_scores import count_different
from llamaconv.verify.independent_readers import IndependentReader, reader_for
from llamaconv.verify.results import Check, Verification
from llamaconv.verify.structure import check_structure

_BLOCK_BYTES = 4 << 20
# Of each tensor, so much is read by other people's readers too.
_FIRST_BYTES = 64 << 10


def verify_receipt(found: Checkpoint, progress: Progress | None = None) -> Verification:
    """Check an opened checkpoint against its own receipt.

    Args:
        found: The checkpoint.
        progress: Called with "verify", the bytes read so far, and all bytes to read.

    Returns:
        The checks ``structure`` and, if that passed, ``digests``.

    Raises:
        RefusedError: There is no valid receipt.
    """
    if found.receipt is None:
        # A damaged receipt is among the errors.
        reason = "no receipt (llamaconv.json). Name the source too: llamaconv verify SRC DST"
        raise RefusedError(found.errors or f"{found.path}: {reason}")
    return Verification(check_receipt(found, progress))


def check_receipt(
    found: Checkpoint, progress: Progress | None = None, digests: bool = True
) -> tuple[Check, ...]:
    """Compare an opened target with its receipt.

    Args:
        found: A checkpoint that has a receipt.
        progress: Called with "verify", the bytes read so far, and all bytes to read.
        digests: Whether to read and compare the weights too.

    Returns:
        The checks ``structure`` and, if that passed and they are asked for, ``digests``.
    """
    receipt = found.receipt
    assert receipt is not None
    expected = {one.target: (one.dtype, one.shape) for one in receipt.tensors}
    # The receipt lists roles, also those that are stored together.
    apart = split_fused(found, receipt.params)
    if receipt.target.with_optimizer:
        apart = with_optimizer(apart, receipt.params)
    structure = check_structure(apart, expected, receipt.params, "receipt")
    if not structure.ok or not digests:
        return (structure,)
    try:
        state = TrainerState({}, {})
        if receipt.target.with_optimizer:
            state = read_trainer_state(found.local_path)
        return structure, _check_digests(found, state, receipt, progress or no_progress)
    except (LlamaconvError, OSError) as error:
        return structure, Check("digests", False, float("inf"), None, str(error))


def receipt_mismatches(receipt: Receipt, plan: Plan) -> list[str]:
    """Compare the conversion that a receipt records with the plan that would be executed now.

    Returns:
        A sentence for each difference. None if the source of ``plan`` is not the folder that the
        receipt names: the same weights may exist elsewhere in another format.
    """
    source = plan.source
    if receipt.source.path != source.resolved_path:
        return []
    wrong = [
        f"the source's {entry} is recorded as {told!r}; expected {value!r}"
        for entry, told, value in (
            ("format", receipt.source.format, source.format),
            ("rope", receipt.source.rope, source.rope),
        )
        if told != value
    ]
    told = {one.target: (one.source, one.operation) for one in receipt.tensors}
    wrong += [
        f"{move.target_name}: recorded as {told[move.target_name]}; expected "
        f"{(move.source, move.operation)}"
        for move in plan.stored
        if told[move.target_name] != (move.source, move.operation)
    ]
    dropped = {move.source for move in plan.moves if move.target is None}
    if dropped != {entry.source for entry in receipt.dropped}:
        wrong.append(f"the dropped tensors are {first_few(sorted(dropped))}; others are recorded")
    if receipt.params != plan.params:
        wrong.append("the parameters are not those of the source")
    return wrong


def _check_digests(
    found: Checkpoint, state: TrainerState, receipt: Receipt, progress: Progress
) -> Check:
    recorded = {whole(one.target): one.digests for one in receipt.tensors}
    tensors = {
        **found.tensors,
        **{name: one for name, one in state.tensors.items() if name in recorded},
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    wrong: list[str] = []
    mixed_up, done = 0, 0
    before: tuple[str, ...] = ("",)
    with PieceReader() as reader, closing(reader_for(found)) as other:
        for name, tensor in tensors.items():
            digests: tuple[str, ...] = ()
            for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
                digests += (_digest(reader, tensor, piece),)
                done += tensor.nbytes // len(tensor.pieces)
                progress("verify", done, total)
            if digests != recorded[name] or (
                name in found.tensors and not _is_read_alike(reader, other, tensor)
            ):
                wrong.append(name)
            # The control: what would be seen had every tensor the bytes of the one before it.
            mixed_up += digests != before
            before = digests
    for one in receipt.values:
        value = state.values.get(one.target)
        if value is None or value.digest() != one.digest:
            wrong.append(one.target)
    detail = f"{len(recorded)} tensors have the bytes that were written (xxh3-128)"
    if receipt.values:
        detail += f", and so have {len(receipt.values)} other entries of the trainer's state"
    if wrong:
        detail = f"{len(wrong)} tensors have changed since they were written: {first_few(wrong)}"
    return Check("digests", not wrong, float(len(wrong)), float(mixed_up), detail)


def _is_read_alike(reader: PieceReader, other: IndependentReader, tensor: TensorInfo) -> bool:
    """Return whether somebody else's reader finds the same first rows; it raises if it finds none.

    Digests are of the tensors' bytes alone. What stands around them tells a reader how to take them.
    """
    n_rows = tensor.shape[0] if tensor.shape else 1
    last = min(n_rows, max(2, _FIRST_BYTES // max(1, tensor.row_bytes)))
    other.prefetch([tensor.name])
    rows = other.rows(tensor.name, 0, last)
    return count_different(read_rows(reader, tensor, 0, last), rows) == 0


def _digest(reader: PieceReader, tensor: TensorInfo, piece: Piece) -> str:
    alone = replace(piece, start=(0,) * len(piece.shape))
    part = TensorInfo(tensor.name, tensor.dtype, piece.shape, (alone,))
    if len(piece.shape) > 2:
        # A row of the first axis may be longer than a block.
        flat = (prod(piece.shape[:-1]), piece.shape[-1])
        part = replace(part, shape=flat, pieces=(replace(alone, start=(0, 0), shape=flat),))
    digest = xxhash.xxh3_128()
    buffer = ReusableBuffer()
    for first, last in part.windows(_BLOCK_BYTES):
        block = buffer.take((last - first) * part.row_bytes)
        reader.read_rows(part, first, last, block)
        digest.update(block)
    return digest.hexdigest()
