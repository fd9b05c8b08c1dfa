"""Executes a plan: the engine writes, the checks run, the receipt says what was done.

The target appears under its name only when it is complete, checked and on the disk.

Of several ranks each writes some of the files, and rank 0 puts the target in place.

What a run that ended early has written is taken over by the next, as far as its digests agree.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from llamaconv import receipt, shell, verify
from llamaconv.advice import Advice, advise
from llamaconv.agreement import agree, fingerprint
from llamaconv.assets import assets_folder
from llamaconv.checks import Verification
from llamaconv.engine import Engine
from llamaconv.plan import Plan
from llamaconv.problems import RefusedError, UnusableError
from llamaconv.ranks import ALONE, Progress, Ranks
from llamaconv.small_files import write_receipt
from llamaconv.staging import staged
from llamaconv.tables import Table, size
from llamaconv.target_check import check_target
from llamaconv.version import __version__


@dataclass(frozen=True, repr=False)
class Conversion:
    """What a finished conversion did; ``verification`` is None where it was not asked for.

    ``seconds`` is the time of writing, without imports and without verification;
    ``bytes_reused`` were written by a run before this one.
    """

    plan: Plan
    target: Path
    seconds: float
    bytes_read: int
    bytes_written: int
    bytes_reused: int
    verification: Verification | None
    receipt: receipt.Receipt
    advice: Advice

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.verification is None or self.verification.ok,
            "target": str(self.target),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bytes_reused": self.bytes_reused,
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
        if self.bytes_reused:
            reused = size(self.bytes_reused)
            rows.insert(3, ("taken over from a run before, by its digests", reused))
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
    ranks: Ranks = ALONE,
) -> Conversion:
    """Executes ``plan`` and writes the checkpoint at ``target``, complete or not at all.

    ``workers`` threads write, by default one a processor and four at most, of which the ranks of
    one host have equal parts. ``as_step_0`` takes ``target`` for a TorchTitan dump folder and
    writes ``target/checkpoint/step-0``. ``progress`` is called with the bytes of all ranks, on
    rank 0.

    With ``ranks`` (`llamaconv.ranks`, inside their ``with``) every rank calls this with its own
    plan of the same conversion, and every rank gets the same result.

    Raises `RefusedError` before anything is written, `FailedError` where the machine, a check or
    another rank failed; either way what stood at ``target`` stands as it was.
    """
    plan.check()
    dump, target = Path(target), Path(target)
    if as_step_0 and plan.target.to != "dcp":
        raise RefusedError("--as-step-0 is for a DCP; leave it out, or choose --to dcp")
    if as_step_0:
        target = dump / "checkpoint" / "step-0"
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) // ranks.local_size))
    if not 1 <= workers <= 64:
        raise RefusedError(f"workers is {workers}; a number from 1 to 64 was expected")
    agree(plan, {"checks": verified, "as-step-0": as_step_0}, ranks)
    identity = fingerprint(plan)
    if ranks.first:
        check_target(target, plan.source.local_path, plan.bytes_to_write, overwrite, identity)
    if changed := plan.source.changed():
        raise RefusedError(changed)
    progress = ranks.counted(progress)
    with staged(target, overwrite, identity, ranks) as folder:
        engine = Engine(plan, progress, ranks)
        began = time.perf_counter()
        digests = engine.write(folder, workers)
        seconds = time.perf_counter() - began
        if changed := plan.source.changed():
            raise UnusableError(changed)
        verification = None
        if verified:
            verification = verify.verify_plan(
                plan,
                folder,
                progress and (lambda done, total: progress("verify", done, total)),
                ranks,
            )
            if not verification.ok:
                raise UnusableError(verification.problems())
        record = _receipt(plan, digests, verification)
        if ranks.first:
            write_receipt(folder, record)
    return Conversion(
        plan=plan,
        target=target,
        seconds=seconds,
        bytes_read=engine.bytes_read,
        bytes_written=engine.bytes_written,
        bytes_reused=engine.bytes_reused,
        verification=verification,
        receipt=record,
        advice=_advise(plan, target, dump if as_step_0 else None),
    )


def _advise(plan: Plan, target: Path, dump: Path | None) -> Advice:
    params, _ = plan.ready()
    if plan.target.to == "dcp":
        return advise(params, plan.target.generation, plan.target.layout, target, dump)
    if plan.target.to == "meta":
        words = ["llamaconv", "verify", str(plan.source.path), str(target)]
        return Advice("Meta's files", "", shell.join(words), "", ())
    load = f"AutoModelForCausalLM.from_pretrained({str(target)!r})"
    command = f"python -c {shell.quote(f'from transformers import AutoModelForCausalLM; {load}')}"
    return Advice("transformers", "", command, "", ())


def _receipt(
    plan: Plan, digests: dict[str, list[str]], verification: Verification | None
) -> receipt.Receipt:
    params, layout = plan.ready()
    assets = assets_folder(plan.source, plan.target)
    return receipt.Receipt(
        source=receipt.SourceRecord(
            path=str(plan.source.local_path.resolve()),
            format=plan.source.format,
            rope=layout,
            assets=str(assets.resolve()) if assets else None,
            files={file.name: file.stat().st_size for file in plan.source.local_files},
        ),
        target=receipt.TargetRecord(**{**asdict(plan.target), "rope": plan.target.layout}),
        params=params,
        tensors=tuple(
            receipt.TensorRecord(
                source=move.source,
                target=move.writes,
                operation=move.operation,
                dtype=move.dtype,
                shape=move.shape,
                digests=tuple(digests[move.writes]),
            )
            for move in plan.written
        ),
        dropped=tuple(
            receipt.DroppedRecord(move.source, move.reason)
            for move in plan.moves
            if move.target is None
        ),
        versions={
            "llamaconv": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verified=_verdict(verification) if verification else None,
    )


def _verdict(verification: Verification) -> receipt.VerdictRecord:
    checks = (receipt.CheckRecord(**check.to_json()) for check in verification.checks)
    return receipt.VerdictRecord(verification.ok, tuple(checks))
