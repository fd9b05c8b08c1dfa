"""Check that a target holds what its source says, in every bit and in meaning.

- structure: torch's own loader opens the target. Names, shapes and dtypes are those of the plan,
  and config.json, params.json and the receipt describe the same model;
- bits: every element equals the source's. Rows are reordered by index arithmetic that shares no
  code with the engine;
- trainer's values: with an optimizer, what is no tensor has the source's bytes, by torch's index;
- rotated scores: q and k of every layer give the same attention scores at distances above 0, each
  side with the rotation of its own layout;
- logits and loss: the reference model on both sides, if it is small enough.

Each figure comes with a control: the same figure for a deliberately wrong conversion, with q and k
left in (or brought into) the other layout. A round trip cannot see a wrong direction, and scores at
distance 0 cannot either.

Memory is bounded: a window of whole heads or of rows is compared at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llamaconv.checkpoint.address import local, path_or_address
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fetch_ahead import Fetched
from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.huggingface import CONFIG
from llamaconv.checkpoint.open import open_checkpoint, open_store_folder
from llamaconv.checkpoint.receipt import Receipt
from llamaconv.checkpoint.store_folder import StoreFolder
from llamaconv.checkpoint.trainer_state import with_optimizer
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import Target, target_like
from llamaconv.ranks import ALONE, OtherRankError, Ranks
from llamaconv.report.errors import LlamaconvError, RefusedError
from llamaconv.report.progress import Progress, no_progress
from llamaconv.verify.bits_and_scores import Comparison, Findings, compare_all, not_finite
from llamaconv.verify.independent_readers import reader_for
from llamaconv.verify.logits import MOST_BYTES, check_logits
from llamaconv.verify.rebuilt import Rebuilt, RebuiltReader
from llamaconv.verify.rebuilt_ranges import RebuiltRanges
from llamaconv.verify.receipt_check import check_receipt, receipt_mismatches, verify_receipt
from llamaconv.verify.results import Check, Verification, checks_from_json, checks_to_json
from llamaconv.verify.structure import check_structure
from llamaconv.verify.trainer_values import check_values
from llamaconv.verify.while_writing import WhileWriting

# What readers and the disk raise for a side that cannot be read.
_UNREADABLE = (LlamaconvError, OSError)


def verify_checkpoint(
    target: str | Path, *, source: str | Path | None = None, progress: Progress | None = None
) -> Verification:
    """Check a checkpoint against its source, or without one against its own receipt.

    With a source, the layout, dtype and tied head that were asked for come from the receipt of the
    target. Without a receipt they come from its tensor names and the default options. Without a
    source, every tensor is read and its digest compared: that finds changes since the conversion,
    but cannot tell whether the conversion was right.

    Args:
        target: The folder to check, or its address in a store.
        source: The checkpoint that it was converted from. A repository of the Hub is fetched again.
        progress: Called with "verify", the bytes compared so far, and all bytes to compare.

    Returns:
        All checks, passed or failed.

    Raises:
        RefusedError: Either cannot be opened, the target is on the Hub, or in a store and with an
            optimizer, or the receipt is missing and needed.
    """
    where = path_or_address(target)
    if isinstance(where, HubAddress):
        local(where)
    found = open_checkpoint(target)
    if found.receipt and found.receipt.target.with_optimizer:
        local(where)
    folder = found.remote if isinstance(found.remote, StoreFolder) else Path(target)
    if source is None:
        return verify_receipt(found, progress)
    if found.receipt:
        expected = Target(**{**asdict(found.receipt.target), "assets": ""})
        recorded = found.receipt.source.assets
        if found.receipt.target.assets and recorded and (Path(recorded) / CONFIG).is_file():
            expected = replace(expected, assets=recorded)
    else:
        expected = target_like(found)
    opened = open_checkpoint(source)
    if found.receipt and found.receipt.target.assets and not expected.assets:
        # The parameters came from a folder that is gone.
        opened = replace(opened, params=found.receipt.params)
    elif opened.params is None and found.params is not None:
        # A DCP without a receipt does not have the number of heads; its target does.
        opened = replace(opened, params=found.params)
    plan = make_plan(opened, expected)
    plan.raise_for_errors()
    verification = verify_plan(plan, folder, progress)
    if found.receipt is None or not verification.ok:
        return verification
    # The target's own receipt is compared as well, and reported only if it is wrong. The bits have
    # just been compared: digests would read a large target once more.
    receipt = check_receipt(found, progress, digests=found.total_bytes <= MOST_BYTES)
    wrong = [check.detail for check in receipt if not check.ok]
    wrong = wrong or receipt_mismatches(found.receipt, plan)
    if not wrong:
        return verification
    failed = Check("receipt", False, float(len(wrong)), None, "; ".join(wrong[:3]))
    return replace(verification, checks=(*verification.checks, failed))


def verify_plan(
    plan: Plan,
    folder: Path | StoreFolder,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    before: WhileWriting | None = None,
) -> Verification:
    """Check that ``folder`` holds what ``plan`` says.

    Several ranks share the bits and the scores, and rank 0 checks the rest. All get one result.

    Args:
        plan: A plan without errors, whose source can be read.
        folder: The target.
        progress: Called with "verify", the bytes compared so far, and all bytes to compare.
        ranks: The processes that check together.
        before: What was compared while the target was written, which is not compared again.
    """
    target, structure = None, None
    if ranks.first:
        try:
            target = _opened(plan, folder)
            structure = _check_structure(plan, target)
        except RefusedError as error:
            nothing = float(len(plan.stored))
            structure = Check("structure", False, nothing, None, error.problems[0].message)
    checks = _from_first([structure] if structure else [], ranks)
    if not checks[0].ok:
        return Verification(tuple(checks))
    mine = Findings()
    try:
        written = replace(target or _opened(plan, folder), params=plan.ready()[0])
        comparisons = [
            Comparison(plan, reader_for(plan.source), reader_for(written))
            # One is faster than a network, and has the memory for what is on its way once.
            for _ in range(1 if plan.source.remote else ranks.threads)
        ]
        comparison = comparisons[0]
        here, there = comparison.source, comparison.target
        known = before.still_there(written) if before else None
        mine = compare_all(comparisons, progress or no_progress, ranks, known)
    except OtherRankError:
        raise
    except _UNREADABLE as error:
        mine.unreadable = _reason(error, plan, folder)
    findings = [mine]
    if ranks.size > 1:
        findings = [Findings.from_json(one) for one in ranks.all_gather(mine.to_json())]
    for one in findings:
        if one.unreadable:
            checks.append(Check("bits", False, float("inf"), None, one.unreadable))
            return Verification(tuple(checks))
    tensors, layers = comparison.merge(findings)
    checks.append(comparison.bits_check(tensors))
    if plan.values and isinstance(folder, Path):
        checks += _from_first([check_values(plan, folder)] if ranks.first else [], ranks)
    if not_finite(tensors):
        # Scores and logits would be NaN too.
        return Verification(tuple(checks), tuple(layers), tuple(tensors))
    checks.append(comparison.scores_check(layers))
    if max(plan.bytes_to_read, plan.bytes_to_write) <= MOST_BYTES:
        logits: list[Check] = []
        if ranks.first:
            try:
                logits = check_logits(plan, here, there)
            except _UNREADABLE as error:
                detail = _reason(error, plan, folder)
                logits = [Check("logits", False, float("inf"), None, detail)]
        checks += _from_first(logits, ranks)
    return Verification(tuple(checks), tuple(layers), tuple(tensors))


def verify_fetched(
    plan: Plan,
    folder: Path | StoreFolder,
    written: Receipt,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    fetched: Sequence[Fetched] = (),
) -> Verification:
    """Check that ``folder`` holds what ``plan`` says, without fetching its source again.

    Every file of a repository is rebuilt from the target and its digest compared with the one that
    the repository lists (see `rebuilt`); of a store, which lists none, every range that was fetched
    is rebuilt and compared with what came (see `rebuilt_ranges`). That is as much as comparing
    every bit. If everything can be rebuilt, the scores and logits are compared as well, with the
    rebuilt rows as the source's. If something cannot, what is on the disk is compared with what was
    written, and the detail says which files are not compared with the source.

    Args:
        plan: A plan without errors, whose source is not here.
        folder: The target.
        written: The receipt of what was written.
        progress: Called with "verify", the bytes checked so far, and all bytes to check.
        ranks: The processes that check together; rank 0 does it for all.
        fetched: The ranges that were fetched, of a source that lists no digests.
    """
    checks: list[Check] = []
    layers: list[tuple[float, float]] = []
    if ranks.first:
        try:
            checks, layers = _check_fetched(
                plan, folder, written, fetched, progress or no_progress, ranks.threads
            )
        except _UNREADABLE as error:
            detail = _reason(error, plan, folder)
            name = "fetched" if fetched else "repository"
            checks = [Check(name, False, float("inf"), None, detail)]
    return Verification(tuple(_from_first(checks, ranks)), tuple(layers))


def _check_fetched(
    plan: Plan,
    folder: Path | StoreFolder,
    written: Receipt,
    fetched: Sequence[Fetched],
    progress: Progress,
    n_threads: int,
) -> tuple[list[Check], list[tuple[float, float]]]:
    target = _opened(plan, folder)
    checks = [_check_structure(plan, target)]
    if not checks[0].ok:
        return checks, []
    target = replace(target, params=plan.ready()[0])
    has_digests = plan.source.remote is not None and bool(plan.source.remote.digests)
    rebuilt = Rebuilt(plan) if has_digests else RebuiltRanges(plan, fetched)
    if rebuilt.files:
        checks.append(rebuilt.check(target, progress, n_threads))
    if not rebuilt.unknown:
        if not checks[-1].ok:
            return checks, []
        of_heads = tuple(move for move in plan.written if move.role and move.role.heads)
        scored = replace(plan, moves=of_heads)
        comparisons = [
            Comparison(scored, RebuiltReader(target, plan), reader_for(target))
            for _ in range(n_threads)
        ]
        comparison = comparisons[0]
        here, there = comparison.source, comparison.target
        _, layers = comparison.merge([compare_all(comparisons, no_progress)])
        checks.append(comparison.scores_check(layers))
        if max(plan.bytes_to_read, plan.bytes_to_write) <= MOST_BYTES:
            checks += check_logits(plan, here, there)
        return checks, layers
    found = replace(_open(folder), receipt=written)
    digests = [check for check in check_receipt(found, progress) if check.name == "digests"]
    checks += [replace(check, detail=f"{check.detail}{rebuilt.remark}") for check in digests]
    return checks, []


def _open(folder: Path | StoreFolder) -> Checkpoint:
    return open_checkpoint(folder) if isinstance(folder, Path) else open_store_folder(folder)


def _opened(plan: Plan, folder: Path | StoreFolder) -> Checkpoint:
    """Open a target, with its optimizer, and take apart what its generation stores together."""
    params, _ = plan.ready()
    found = split_fused(_open(folder), params)
    return with_optimizer(found, params) if plan.target.with_optimizer else found


def _from_first(checks: Sequence[Check], ranks: Ranks) -> list[Check]:
    """Return rank 0's checks, on every rank."""
    if ranks.size == 1:
        return [*checks]
    return checks_from_json(ranks.broadcast(checks_to_json(checks)))


def _reason(error: LlamaconvError | OSError, plan: Plan, folder: Path | StoreFolder) -> str:
    """Return what to report of an error that arose while both sides were read."""
    if isinstance(error, LlamaconvError):
        return error.problems[0].message
    there = folder if isinstance(folder, Path) else folder.path
    return f"{error.filename or f'{plan.source.path} or {there}'}: {error.strerror or error}"


def _check_structure(plan: Plan, target: Checkpoint) -> Check:
    """Compare the target with the plan; the control is a target with wrong names."""
    params, _ = plan.ready()
    expected = {move.target_name: (move.dtype, move.shape) for move in plan.stored}
    other = "titan-0.2" if plan.target.naming == "titan-0.3" else "titan-0.3"
    renamed = (move.role and move.role.in_naming(other, move.layer) for move in plan.written)
    misnamed = tuple(name or "" for name in renamed)
    return check_structure(target, expected, params, "plan", misnamed)
