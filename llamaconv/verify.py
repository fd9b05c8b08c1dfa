"""Checks that can fail: is the target what the source says, in every bit and in meaning?

- structure: torch's own loader opens the target; names, shapes and dtypes are the plan's, and
  what stands beside the weights (config.json, params.json) says the plan's parameters;
- bits: every element against the source, read by the safetensors library and placed by index
  arithmetic, which shares no code with the engine;
- rotated scores: q and k of every layer give the same attention scores at distances above 0,
  each side with the rotation of its own layout;
- logits and loss: the reference model on both sides, where it is small enough.

Each figure stands beside its yardstick: the same figure for the conversion done wrong on
purpose, with q and k left in (or brought into) the other layout. A round trip could not see a
wrong direction, and the scores at distance 0 cannot either.

Memory stays bounded: tensors are compared a window of whole heads or of rows at a time.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaconv import model
from llamaconv.checks import Check, Verification
from llamaconv.comparison import Comparison, Progress, other_layout
from llamaconv.formats.detect import open_checkpoint
from llamaconv.opened import Checkpoint
from llamaconv.oracles import Oracle, oracle
from llamaconv.plan import CHOICES, Plan, Target
from llamaconv.planner import make_plan
from llamaconv.problems import LlamaconvError, RefusedError
from llamaconv.ranks import ALONE, OtherRankError, Ranks
from llamaconv.receipt import TargetRecord
from llamaconv.receipt_check import check_receipt, history_otherwise
from llamaconv.remote import refuse_remote
from llamaconv.sample import held_out_text
from llamaconv.structure import check_structure

# The reference forward holds both sides in float32.
_FORWARD_BYTES = 64_000_000
_FORWARD_TOKENS = 512
# Logits of the two layouts differ only by the rounding of float32 sums.
_LOGIT_TOLERANCE = 1e-3

# What the oracles and the disk raise for a side that cannot be read.
_UNREADABLE = (LlamaconvError, OSError)


def verify_checkpoint(
    source: str | Path, target: str | Path, progress: Progress | None = None
) -> Verification:
    """Checks the checkpoint at ``target`` against the one it was made from.

    What was asked for (layout, dtype, tie) comes from the target's receipt; without one, from
    its names and the defaults. Raises `RefusedError` where either cannot be opened, or is
    on the Hub.
    """
    refuse_remote(source, target)
    found = open_checkpoint(target)
    if found.receipt:
        wanted = _wanted(Path(target), found.receipt.target)
    elif found.format == "huggingface":
        wanted = Target(to="hf")
    elif found.format == "meta":
        wanted = Target(to="meta")
    elif found.generation in CHOICES["generation"]:
        wanted = Target(to="dcp", generation=found.generation)
    else:
        reason = "no receipt says what it was made from, and its names are no target's"
        raise RefusedError(found.errors or f"{target}: {reason}")
    opened = open_checkpoint(source)
    if opened.params is None and found.params is not None:
        # A DCP without a receipt names no heads; the folder made from it does.
        opened = replace(opened, params=found.params)
    plan = make_plan(opened, wanted)
    plan.check()
    verification = verify_plan(plan, Path(target), progress)
    if found.receipt is None or not verification.ok:
        return verification
    # What the target's own receipt says is compared as well, and heard of only where it is wrong.
    # The bits have just been compared: digests would read a large target once more.
    small = found.total_bytes <= _FORWARD_BYTES
    receipt = check_receipt(found, progress, digests=small)
    wrong = [check.detail for check in receipt if not check.ok]
    wrong = wrong or history_otherwise(found.receipt, plan)
    if not wrong:
        return verification
    failed = Check("receipt", False, float(len(wrong)), None, "; ".join(wrong[:3]))
    return replace(verification, checks=(*verification.checks, failed))


def _wanted(target: Path, options: TargetRecord) -> Target:
    """Return the options that a receipt has. Raises `RefusedError` for values that are not offered."""
    return Target(**{**asdict(options), "assets": ""})


def verify_plan(
    plan: Plan, folder: Path, progress: Progress | None = None, ranks: Ranks = ALONE
) -> Verification:
    """Checks that ``folder`` holds what ``plan`` says, see the module's text.

    Several ranks share the bits and the scores; rank 0 checks the rest. All get the same.
    """
    target = found = None
    if ranks.first:
        try:
            target = open_checkpoint(folder)
            found = _check_structure(plan, target)
        except RefusedError as error:
            nothing = float(len(plan.written))
            found = Check("structure", False, nothing, None, error.problems[0].message)
    structure = Check(**ranks.broadcast(found and asdict(found)))
    if not structure.ok:
        return Verification((structure,))
    said: dict[str, Any] = {}
    try:
        here, there = oracle(plan.source), oracle(target or open_checkpoint(folder))
        comparison = Comparison(plan, here, there)
        comparison.run(progress or (lambda done, total: None), ranks)
        said = comparison.findings()
    except OtherRankError:
        raise
    except _UNREADABLE as error:
        said = {"unreadable": _reason(error, plan, folder)}
    findings = ranks.all_gather(said)
    for one in findings:
        if "unreadable" in one:
            check = Check("bits", False, float("inf"), None, one["unreadable"])
            return Verification((structure, check))
    comparison.merge(findings)
    checks = [structure, comparison.bits_check(), comparison.scores_check()]
    if max(plan.bytes_to_read, plan.bytes_to_write) <= _FORWARD_BYTES:
        forward = _try_forward(plan, folder, here, there) if ranks.first else []
        checks += [Check(**one) for one in ranks.broadcast([asdict(one) for one in forward])]
    return Verification(tuple(checks), tuple(comparison.layers), tuple(comparison.tensors))


def _reason(error: LlamaconvError | OSError, plan: Plan, folder: Path) -> str:
    """Return what to report of an error that arose while both sides were read."""
    if isinstance(error, LlamaconvError):
        return error.problems[0].message
    return f"{error.filename or f'{plan.source.path} or {folder}'}: {error.strerror or error}"


def _check_structure(plan: Plan, target: Checkpoint) -> Check:
    """Compare the target with the plan; the control is the same with the names left wrong."""
    params, _ = plan.ready()
    expected = {move.writes: (move.dtype, move.shape) for move in plan.written}
    other = "titan-0.2" if plan.target.naming == "titan-0.3" else "titan-0.3"
    renamed = (move.role and move.role.in_naming(other, move.layer) for move in plan.written)
    misnamed = tuple(name or "" for name in renamed)
    return check_structure(target, expected, params, "plan", misnamed)


def _try_forward(plan: Plan, folder: Path, here: Oracle, there: Oracle) -> list[Check]:
    """`_check_forward`, or one check that failed, where a side can no longer be read."""
    try:
        return _check_forward(plan, here, there)
    except _UNREADABLE as error:
        return [Check("logits", False, float("inf"), None, _reason(error, plan, folder))]


def _check_forward(plan: Plan, here: Oracle, there: Oracle) -> list[Check]:
    """Logits and loss of the reference model on both sides, on the sample's held-out text."""
    params, layout = plan.ready()
    source: dict[tuple[str, int | None], Tensor] = {}
    target: dict[tuple[str, int | None], Tensor] = {}
    for move in plan.written:
        dtype, n_rows = getattr(torch, move.dtype), move.shape[0]
        source[move.place] = here.rows(move.source, 0, n_rows).to(dtype, copy=True)
        target[move.place] = there.rows(move.writes, 0, n_rows).clone()
    for side in (source, target):
        # A tied head that is not stored is the embedding.
        side.setdefault(("output", None), side["tok_embeddings", None])
    # A loss needs a second token, however short the model's own positions.
    n_tokens = max(2, min(_FORWARD_TOKENS, params.max_position or _FORWARD_TOKENS))
    text = torch.tensor(list(held_out_text()[:n_tokens])) % params.vocab_size
    tokens_BP = text.unsqueeze(0)
    with torch.no_grad():
        right = model.forward(source, params, tokens_BP, layout)
        found = model.forward(target, params, tokens_BP, plan.target.layout)
        wrong = model.forward(source, params, tokens_BP, other_layout(layout))
    largest = max(1.0, right.abs().max().item())
    value, yardstick = ((side - right).abs().max().item() / largest for side in (found, wrong))
    losses = [model.loss(side, tokens_BP).item() for side in (right, found, wrong)]
    return [
        Check(
            "logits",
            value <= _LOGIT_TOLERANCE,
            value,
            yardstick,
            f"largest relative difference on {n_tokens} tokens, logits up to {largest:.2g}",
            _LOGIT_TOLERANCE,
        ),
        Check(
            "loss",
            abs(losses[1] - losses[0]) <= _LOGIT_TOLERANCE,
            abs(losses[1] - losses[0]),
            abs(losses[2] - losses[0]),
            f"source {losses[0]:.2f}, target {losses[1]:.2f}, done wrong {losses[2]:.2f} nats a token",
            _LOGIT_TOLERANCE,
        ),
    ]
