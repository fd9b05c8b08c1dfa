"""Create the receipt of a finished conversion: source, options, digests, results of the checks."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict

import safetensors
import torch

from llamaconv import __version__
from llamaconv.checkpoint.receipt import (
    CheckRecord,
    DroppedRecord,
    Receipt,
    SourceRecord,
    TargetRecord,
    TensorRecord,
    ValueRecord,
    VerdictRecord,
)
from llamaconv.model.names import whole
from llamaconv.plan.plan import Plan
from llamaconv.verify.results import Verification


def make_receipt(
    plan: Plan, digests: dict[str, list[str]], verification: Verification | None
) -> Receipt:
    """Return the record of a finished conversion.

    Args:
        plan: The conversion.
        digests: The xxh3-128 digests of every stored tensor's pieces. Roles that are stored
            together have the same.
        verification: The checks that it passed, None if they were skipped.
    """
    params, _ = plan.ready()
    return Receipt(
        source=source_record(plan),
        target=target_record(plan),
        params=params,
        tensors=tuple(
            TensorRecord(
                source=move.source,
                target=move.target_name,
                operation=move.operation,
                dtype=move.dtype,
                shape=move.shape,
                digests=tuple(digests[whole(move.target_name)]),
            )
            for move in plan.stored
        ),
        dropped=tuple(
            DroppedRecord(move.source, move.reason) for move in plan.moves if move.target is None
        ),
        values=tuple(
            ValueRecord(copy.source.name, copy.target, copy.source.length, digests[copy.target][0])
            for copy in plan.values
        ),
        versions={
            "llamaconv": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        verified=_verdict(verification) if verification else None,
    )


def source_record(plan: Plan) -> SourceRecord:
    """Return what the receipt of this conversion says about its source."""
    _, layout = plan.ready()
    return SourceRecord(
        path=plan.source.resolved_path,
        format=plan.source.format,
        rope=layout,
        assets=str(plan.assets.resolve()) if plan.assets else None,
        files={**plan.source.file_bytes},
    )


def target_record(plan: Plan) -> TargetRecord:
    """Return what the receipt of this conversion says about its options."""
    return TargetRecord(**{**asdict(plan.target), "rope": plan.target.layout})


def _verdict(verification: Verification) -> VerdictRecord:
    checks = (CheckRecord(**check.to_json()) for check in verification.checks)
    return VerdictRecord(verification.ok, tuple(checks))
