"""Execute a plan: write the target, check it, and record in a receipt what was done.

The target gets its name only when it is complete, checked and fsynced; with ``overwrite`` the old
one stays until then. Until then the files are in ``NAME.llamaconv-partial`` next to it. After a
kill, a full disk or Ctrl-C that folder stays, and the same conversion continues from it: after a
kill at 80 % the next run writes less than a quarter. Before it reuses data, it reads it again and
compares digests. Nothing is reused if the source, the options or the version changed, and a run
whose checks failed leaves nothing.

Of two conversions to one target, one continues and the other is refused. A reader that has opened
the old target's folder sees the old files, or finds files deleted. A reader that opens files by
path while a target is replaced may get files of both: ``llamaconv verify`` reports that, and
``dcp.load`` does not.

Each of several ranks writes some of the files, and rank 0 puts the target in place.

A repository of the Hub, or a folder of a store, is read by ranges, ahead of the writer, and never
stored. An interrupted conversion fetches what is missing.

A target in an object store (``s3://`` and others) is sent there as streams, and checked by reading
it back; what makes a checkpoint of it is sent last. An interruption leaves nothing there and is
not continued, and nothing is overwritten (see `uploading`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import path_or_address
from llamaconv.checkpoint.fetch_ahead import Fetched
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.receipt import Receipt
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.convert.agreement import agree, fingerprint
from llamaconv.convert.destination import Destination
from llamaconv.convert.disk import Disk, is_long
from llamaconv.convert.engine import Engine
from llamaconv.convert.make_receipt import make_receipt
from llamaconv.convert.next_steps import dump_of, next_steps, step_name
from llamaconv.convert.small_files import write_receipt
from llamaconv.convert.staging import staged
from llamaconv.convert.store import LAST, Store
from llamaconv.convert.target_check import check_target
from llamaconv.convert.training_files import folder_for, write_training_files
from llamaconv.convert.uploading import check_store_target, uploaded
from llamaconv.plan.plan import Plan
from llamaconv.plan.target import RULES
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import FailedError, Problem, RefusedError, UnusableError
from llamaconv.report.progress import Progress
from llamaconv.report.tables import Table, size
from llamaconv.torchtitan.advice import Advice
from llamaconv.verify import verify
from llamaconv.verify.results import Verification
from llamaconv.verify.while_writing import WhileWriting

_SENDERS = 4


@dataclass(frozen=True, repr=False)
class Conversion:
    """What a finished conversion did.

    Attributes:
        plan: The plan that was executed.
        target: The folder of the target, or its address.
        seconds: Time of writing, without imports and the checks that follow it.
        bytes_read: Bytes of tensors read from the source, those of the checks not included.
        bytes_written: Bytes of tensors written.
        bytes_reused: Bytes of tensors that an interrupted run had written.
        verification: The checks, None if they were skipped.
        receipt: The receipt that is in the target.
        advice: What to run next, with the folder of the files that start training.
        was_refused: Whether the filesystem refused to be written around the page cache, which a
            target of many GB is.
    """

    plan: Plan
    target: Path | StoreAddress
    seconds: float
    bytes_read: int
    bytes_written: int
    bytes_reused: int
    verification: Verification | None
    receipt: Receipt
    advice: Advice
    was_refused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the conversion as ``llamaconv convert --json`` prints it.

        Returns:
            An object with ``ok``, ``target`` (path), ``bytes_read``, ``bytes_written``,
            ``bytes_reused``, ``seconds``, ``verified`` (false if the checks were skipped),
            ``checks`` (see `llamaconv.verify.results.Check.to_json`), and the entries of
            `llamaconv.torchtitan.advice.Advice.to_json`.
        """
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
        """Return the number of tensors, and bytes read, written and reused."""
        checks = "not run" if self.verification is None else "passed"
        rows = [
            ("tensors written", len(self.plan.stored)),
            ("bytes read", size(self.bytes_read)),
            ("bytes written", size(self.bytes_written)),
            ("checks", checks),
        ]
        if self.bytes_reused:
            reused = size(self.bytes_reused)
            rows.insert(3, ("reused from an interrupted run (digests match)", reused))
        if self.was_refused:
            rows.append(("written through the page cache", "the filesystem has no direct writes"))
        return Table(("conversion", "done"), rows, right=("done",))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def convert_checkpoint(
    plan: Plan,
    target: str | Path | StoreAddress,
    *,
    overwrite: bool = False,
    verified: bool = True,
    workers: int | None = None,
    as_step_0: bool = False,
    training_files: Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Execute ``plan`` and write the checkpoint at ``target``, complete or not at all.

    Args:
        plan: A plan without errors.
        target: The folder to write, or its address in a store, such as ``s3://BUCKET/NAME``.
        overwrite: Replace a checkpoint at ``target``. A folder with anything else is refused, and so
            is a store, which cannot exchange two folders at once.
        verified: Check the target before it gets its name.
        workers: Writer threads of this rank, from 1 to 64. By default one per CPU, at most 4, which
            the ranks of a host share. From the Hub or a store, always one; to a store, four per
            host.
        as_step_0: ``target`` is a dump folder of TorchTitan: write ``checkpoint/step-0`` in it.
        training_files: Where to write ``train.sh``, and the module it may need, for a DCP. By
            default NAME-train next to ``target``, or here for a store; files there that were
            edited are kept.
        progress: Called on rank 0 with the step ("write" or "verify"), the bytes that all ranks
            have done, and all its bytes.
        ranks: The processes that convert together, entered (`llamaconv.ranks`). Each calls this
            function with its own plan of the same conversion, and gets the same result.

    Returns:
        What was done. Of several ranks, rank 0 alone knows where the training files are.

    Raises:
        RefusedError: The plan has errors, the target must not or cannot be written, or the ranks do
            not agree. Nothing was written.
        FailedError: The machine, the Hub, a store, a check or another rank failed. A target that
            existed before is unchanged.
    """
    plan.raise_for_errors()
    target, dump = _resolve_target(plan, _where(target), as_step_0)
    workers = _resolve_workers(workers, ranks, target)
    if plan.source.remote is not None:
        _check_ranges(plan)
        workers = 1  # one writer is faster than a network, and takes what it fetches in order
    agree(plan, {"checks": verified, "as-step-0": as_step_0}, ranks)
    identity = fingerprint(plan)
    if ranks.first and isinstance(target, StoreAddress):
        check_store_target(target, plan.source.path, overwrite, LAST[plan.target.format])
    elif ranks.first and isinstance(target, Path):
        check_target(target, plan.source.path, plan.bytes_to_write, overwrite, identity)
    if changed := plan.source.changed():
        raise RefusedError(changed)
    progress = ranks.counted(progress)
    with (
        _unfinished(plan, target, overwrite, identity, ranks) as files,
        _while_writing(plan, files, verified, ranks) as checks,
    ):
        engine = Engine(plan, progress, ranks, checks)
        began = time.perf_counter()
        digests = engine.write(files, workers)
        if checks is not None:
            checks.finish()
        seconds = time.perf_counter() - began
        if changed := _changed_meanwhile(plan):
            raise UnusableError(changed)
        verification = None
        if verified:
            verification = _verify(plan, files, digests, engine.fetched, progress, ranks, checks)
        record = make_receipt(plan, digests, verification)
        if ranks.first:
            write_receipt(files, record)
    advice = next_steps(plan, target, dump)
    if ranks.first:
        advice = write_training_files(advice, training_files or folder_for(target, dump))
    return Conversion(
        plan=plan,
        target=target,
        seconds=seconds,
        bytes_read=engine.bytes_read,
        bytes_written=engine.bytes_written,
        bytes_reused=engine.bytes_reused,
        verification=verification,
        receipt=record,
        advice=advice,
        was_refused=engine.was_refused,
    )


def _changed_meanwhile(plan: Plan) -> list[Problem]:
    """Return a problem for each file of the source that is not what it was.

    Raises:
        FailedError: A store does not say. What was written can be used by the next run.
    """
    try:
        return plan.source.changed()
    except RefusedError as error:
        raise FailedError(error.problems) from error


@contextmanager
def _unfinished(
    plan: Plan, target: Path | StoreAddress, overwrite: bool, identity: str, ranks: Ranks
) -> Iterator[Destination]:
    """Give the files of ``target`` to write, which are its own after the block."""
    if isinstance(target, StoreAddress):
        with uploaded(target, LAST[plan.target.format], ranks) as store:
            yield store
    else:
        with staged(target, overwrite, identity, ranks) as folder:
            yield Disk(folder)


def _where(target: str | Path | StoreAddress) -> Path | StoreAddress:
    """Return what the user's ``target`` names. Raises `RefusedError` if nothing is written there."""
    found = target if isinstance(target, StoreAddress) else path_or_address(target)
    if isinstance(found, HubAddress):
        raise RefusedError(f"{found}: nothing is written to the Hub. Name a folder")
    return found


def _resolve_target(
    plan: Plan, target: Path | StoreAddress, as_step_0: bool
) -> tuple[Path | StoreAddress, Path | None]:
    """Return the folder to write, and the dump folder of TorchTitan that it is in."""
    if isinstance(target, StoreAddress):
        options = {"--as-step-0": as_step_0, "--with-optimizer": plan.target.with_optimizer}
        for option in (option for option, is_given in options.items() if is_given):
            raise RefusedError(
                f"{target}: {option} is for a local folder. Convert to one, then copy it to the store"
            )
        return target, None
    if plan.target.with_optimizer:
        if as_step_0 or target.name == "step-0":
            raise RefusedError(
                f"{target}: TorchTitan takes nothing but the model from a step-0. With --with-optimizer, "
                f"name the target as the source: DUMP/checkpoint/{step_name(plan)}"
            )
        return target, dump_of(target)
    if not as_step_0:
        return target, None
    if "as_step_0" not in RULES[plan.target.format].options:
        raise RefusedError("--as-step-0 is for a DCP; leave it out, or choose --to dcp")
    return target / "checkpoint" / "step-0", target


def _resolve_workers(workers: int | None, ranks: Ranks, target: Path | StoreAddress) -> int:
    if isinstance(target, StoreAddress) and not Store(target).is_shareable:
        return 1
    if workers is None:
        # Those that send mostly wait.
        is_store = isinstance(target, StoreAddress)
        return max(1, _SENDERS // ranks.local_size) if is_store else ranks.threads
    if not 1 <= workers <= 64:
        raise RefusedError(f"workers must be between 1 and 64; got {workers}")
    return workers


def _check_ranges(plan: Plan) -> None:
    """Refuse a repository whose host sends nothing but whole files."""
    repository = plan.source.remote
    if repository is not None and not repository.has_ranges:
        raise RefusedError(
            f"{repository.path}: the host answers with whole files, not with the ranges that are "
            "needed, perhaps by way of a proxy. Download the repository and convert the folder: "
            f"{repository.path.download}"
        )


def _while_writing(
    plan: Plan, files: Destination, verified: bool, ranks: Ranks
) -> AbstractContextManager[WhileWriting | None]:
    """Return what compares the target while it is written, where that can be done."""
    # A rank checks what others wrote, and what comes from another machine is not fetched twice.
    if not verified or ranks.size > 1 or plan.source.remote is not None:
        return nullcontext()
    if not isinstance(files, Disk):
        return nullcontext()
    # The end of one of Meta's files says what is in it.
    if plan.target.format == "meta":
        return nullcontext()
    checks = WhileWriting(plan, files.folder, ranks.threads, is_long(plan.bytes_to_write))
    # What is written for them passes through the page cache; for a small part, that is no gain.
    return checks if 2 * checks.n_bytes > plan.bytes_to_write else nullcontext()


def _verify(
    plan: Plan,
    files: Destination,
    digests: dict[str, list[str]],
    fetched: Sequence[Fetched],
    progress: Progress,
    ranks: Ranks,
    checks: WhileWriting | None,
) -> Verification:
    folder = files.to_check(ranks)
    if plan.source.remote is None:
        verification = verify.verify_plan(plan, folder, progress, ranks, checks)
    else:
        written = make_receipt(plan, digests, None)
        verification = verify.verify_fetched(plan, folder, written, progress, ranks, fetched)
    if not verification.ok:
        raise UnusableError(verification.problems)
    return verification
