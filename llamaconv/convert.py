"""The engine: executes a plan, streaming bounded blocks from source pieces to the target.

A block is a run of rows of some MiB, or whole heads where rows are re-ordered; it is read,
re-ordered, cast and written before the next is read, so memory does not grow with the model.
The target appears under its name only when it is complete, checked and on the disk.

Limit: one process; a few threads, each with its own file.
"""

from __future__ import annotations

import datetime
import errno
import os
import platform
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from llamaconv import receipt, rope, verify
from llamaconv.advice import Advice, advise
from llamaconv.assets import assets_folder
from llamaconv.checks import Verification
from llamaconv.formats import dcp_write, huggingface_write, meta_write
from llamaconv.pieces import PieceReader, TensorInfo
from llamaconv.plan import Move, Plan
from llamaconv.problems import FailedError, Problem, RefusedError
from llamaconv.staging import check_target, staged
from llamaconv.tables import Table, size
from llamaconv.threads import one_thread
from llamaconv.version import __version__

Progress = Callable[[str, int, int], None]
"""What is being done ("write" or "verify"), bytes done, bytes in all. Called from threads."""

_BLOCK_BYTES = 4 << 20
_OPEN_AGAIN = "something else writes to the source; open it again when that has ended"


@dataclass(frozen=True, repr=False)
class Conversion:
    """What a finished conversion did; ``verification`` is None where it was not asked for.

    ``seconds`` is the time of writing, without imports and without verification.
    """

    plan: Plan
    target: Path
    seconds: float
    bytes_read: int
    bytes_written: int
    verification: Verification | None
    receipt: receipt.Receipt
    advice: Advice

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.verification is None or self.verification.ok,
            "target": str(self.target),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "verified": self.verification is not None and self.verification.ok,
            "checks": self.verification.to_json()["checks"] if self.verification else [],
            **self.advice.to_json(),
        }

    def table(self) -> Table:
        checks = "not run" if self.verification is None else "passed"
        rows = [
            ("tensors written", len(self.plan.written)),
            ("bytes read", size(self.bytes_read)),
            ("bytes written", size(self.bytes_written)),
            ("checks", checks),
        ]
        return Table(("conversion", "done"), rows, right=("done",))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def convert_checkpoint(
    plan: Plan,
    target: str | Path,
    *,
    overwrite: bool = False,
    verified: bool = True,
    workers: int | None = None,
    as_step_0: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Executes ``plan`` and writes the checkpoint at ``target``, complete or not at all.

    ``workers`` threads write, by default one a processor and four at most. ``as_step_0`` takes
    ``target`` for a TorchTitan dump folder and writes ``target/checkpoint/step-0``.

    Raises `RefusedError` before anything is written, `FailedError` where the machine or a
    check failed; either way what stood at ``target`` stands as it was.
    """
    plan.check()
    assert plan.params is not None
    dump, target = Path(target), Path(target)
    if as_step_0 and plan.target.to != "dcp":
        raise RefusedError("--as-step-0 is for a DCP; leave it out, or choose --to dcp")
    if as_step_0:
        target = dump / "checkpoint" / "step-0"
    if workers is None:
        workers = min(4, os.cpu_count() or 1)
    if not 1 <= workers <= 64:
        raise RefusedError(f"workers is {workers}; a number from 1 to 64 was expected")
    check_target(target, plan.source.local_path, plan.bytes_to_write, overwrite)
    if changed := plan.source.changed():
        raise RefusedError([*changed, Problem(f"{plan.source.path}: {_OPEN_AGAIN}")])
    with _machine_failures(target), staged(target, overwrite) as folder:
        engine = _Engine(plan, progress)
        began = time.perf_counter()
        digests = engine.write(folder, workers)
        seconds = time.perf_counter() - began
        if changed := plan.source.changed():
            raise FailedError([*changed, Problem(f"{plan.source.path}: {_OPEN_AGAIN}")])
        verification = None
        if verified:
            verification = verify.verify_plan(
                plan, folder, progress and (lambda done, total: progress("verify", done, total))
            )
            if not verification.ok:
                raise FailedError(verification.problems())
        record = _receipt(plan, digests, verification)
        receipt.write(folder, record)
    return Conversion(
        plan=plan,
        target=target,
        seconds=seconds,
        bytes_read=engine.bytes_read,
        bytes_written=engine.bytes_written,
        verification=verification,
        receipt=record,
        advice=_advise(plan, target, dump if as_step_0 else None),
    )


def _advise(plan: Plan, target: Path, dump: Path | None) -> Advice:
    assert plan.params is not None
    if plan.target.to == "dcp":
        return advise(plan.params, plan.target.generation, plan.target.layout, target, dump)
    if plan.target.to == "meta":
        words = ["llamaconv", "verify", str(plan.source.path), str(target)]
        return Advice("Meta's files", "", shlex.join(words), "", ())
    load = f"AutoModelForCausalLM.from_pretrained({str(target)!r})"
    command = f"python -c {shlex.quote(f'from transformers import AutoModelForCausalLM; {load}')}"
    return Advice("transformers", "", command, "", ())


def target_rows(plan: Plan, name: str, first: int, last: int) -> Iterator[bytes]:
    """The bytes that a conversion would write for rows ``first`` to ``last`` of ``name``.

    ``name`` is a target's; the last row is excluded. Reads these rows, or the heads that they
    are of, and writes nothing. Raises `FailedError` where the source ends early.
    """
    engine = _Engine(plan, None)
    with engine.reader:
        yield from map(bytes, engine.blocks(name, first, last))


class _Engine:
    """Turns moves into blocks of target bytes, and counts what passes."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        assert plan.source.rope is not None
        self.plan = plan
        self.layout = plan.source.rope
        self.moves = {move.writes: move for move in plan.written}
        self.progress = progress
        self.total = plan.bytes_to_write
        self.bytes_read = self.bytes_written = 0
        self.overflows: dict[str, int] = {}
        self._lock = threading.Lock()
        self.reader = PieceReader()

    def write(self, folder: Path, workers: int) -> dict[str, list[str]]:
        """Writes the target's tensors to ``folder``; digests by tensor."""
        tensors = [TensorInfo(move.writes, move.dtype, move.shape) for move in self.plan.written]
        # Writers work side by side, so torch's own threads would only take turns with them.
        with self.reader, one_thread():
            digests = self._write_format(folder, tensors, workers)
        if self.overflows:
            raise FailedError(
                Problem(
                    f"{self.moves[name].source}: {count} finite values become infinite in "
                    f"{self.moves[name].dtype}; keep the dtype, or choose bfloat16",
                    (name,),
                )
                for name, count in self.overflows.items()
            )
        return digests

    def _write_format(
        self, folder: Path, tensors: list[TensorInfo], workers: int
    ) -> dict[str, list[str]]:
        target, params = self.plan.target, self.plan.params
        assert params is not None
        if target.to == "dcp":
            return dcp_write.write(folder, tensors, target.shards, self.blocks, workers)
        assets = assets_folder(self.plan.source, target)
        if target.to == "meta":
            meta_write.write_params(folder, params, assets)
            return meta_write.write(folder, tensors, target.shards, self.blocks, workers)
        dtypes = {tensor.dtype for tensor in tensors}
        huggingface_write.write_assets(folder, params, dtypes, assets)
        return huggingface_write.write(folder, tensors, target.max_shard_size, self.blocks, workers)

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """The target's bytes of rows ``first`` to ``last``, a block at a time.

        A block is valid until the next is asked for: its buffer is used again.
        """
        move = self.moves[name]
        source = self.plan.source.tensors[move.source]
        unit = move.shape[0] // move.heads if move.heads else 1
        step = max(1, _BLOCK_BYTES // (unit * max(1, source.row_bytes))) * unit
        buffer = memoryview(bytearray(min(step, source.n_rows) * source.row_bytes))
        # Rows of a chunk may begin inside a head: whole heads are read, the wanted rows leave.
        for begin in range(first - first % unit, last, step):
            end = min(begin + step, last + -last % unit)
            block = buffer[: (end - begin) * source.row_bytes]
            self.reader.read_rows(source, begin, end, block)
            out = self._transform(move, source, block)
            row_bytes = len(out) // (end - begin)
            out = out[
                (max(first, begin) - begin) * row_bytes : (min(last, end) - begin) * row_bytes
            ]
            self._count(len(block), len(out))
            yield out

    def _transform(self, move: Move, source: TensorInfo, block: memoryview) -> memoryview:
        """A block of source rows as the target's: re-ordered, then cast."""
        if not move.heads and move.dtype == source.dtype:
            return block
        rows = torch.frombuffer(block, dtype=getattr(torch, source.dtype))
        rows = rows.view(-1, *source.shape[1:])
        if move.heads:
            heads = rows.shape[0] * move.heads // move.shape[0]
            rows = rope.relayout(rows, heads, self.layout, self.plan.target.layout)
        dtype = getattr(torch, move.dtype)
        out = memoryview(bytearray(rows.numel() * dtype.itemsize))
        # copy_ casts; a view over the bytes needs no numpy to get at them.
        target = torch.frombuffer(out, dtype=dtype).view(rows.shape).copy_(rows)
        if move.dtype != source.dtype:
            self._count_overflow(move, rows, target)
        return out

    def _count_overflow(self, move: Move, rows: torch.Tensor, target: torch.Tensor) -> None:
        if count := int((target.isinf() & rows.isfinite()).sum()):
            with self._lock:
                self.overflows[move.writes] = self.overflows.get(move.writes, 0) + count

    def _count(self, n_read: int, n_written: int) -> None:
        with self._lock:
            self.bytes_read += n_read
            self.bytes_written += n_written
            done = self.bytes_written
        if self.progress:
            self.progress("write", done, self.total)


class _machine_failures:
    """Turns what the machine raises while a target is written into one `FailedError`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"{reason}: the disk is full; free some space or choose another target"
            raise FailedError(
                f"{error.filename or self.target}: {reason}; the target is as it was before"
            ) from error


def _receipt(
    plan: Plan, digests: dict[str, list[str]], verification: Verification | None
) -> receipt.Receipt:
    assert plan.params is not None
    assets = assets_folder(plan.source, plan.target)
    files = {piece.local_file for tensor in plan.source.tensors.values() for piece in tensor.pieces}
    return receipt.Receipt(
        source={
            "path": str(plan.source.local_path.resolve()),
            "format": plan.source.format,
            "rope": plan.source.rope,
            "assets": str(assets.resolve()) if assets else None,
            "files": {file.name: file.stat().st_size for file in sorted(files)},
        },
        target={**asdict(plan.target), "rope": plan.target.layout},
        params=plan.params,
        tensors=[
            {
                "source": move.source,
                "target": move.target,
                "operation": move.operation,
                "dtype": move.dtype,
                "shape": list(move.shape),
                "digests": digests[move.writes],
            }
            for move in plan.written
        ],
        dropped=[
            {"source": move.source, "reason": move.reason}
            for move in plan.moves
            if move.target is None
        ],
        versions={
            "llamaconv": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verified=verification.to_json() if verification else None,
    )
