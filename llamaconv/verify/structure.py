"""Check the structure of a target: names, shapes, dtypes, and the files next to the weights.

`verify` compares it with a plan, `receipt_check` with a receipt.
"""

from __future__ import annotations

from collections.abc import Mapping

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import first_few
from llamaconv.verify.configuration import config_mismatches
from llamaconv.verify.results import Check

Expected = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor, by its name."""


def check_structure(
    target: Checkpoint,
    expected: Expected,
    params: LlamaParams,
    whose: str,
    misnamed: tuple[str, ...] | None = None,
) -> Check:
    """Compare the tensors of ``target``, and the files next to them, with what is expected.

    Args:
        target: The opened target.
        expected: Every tensor that it should hold.
        params: What config.json, params.json and the receipt should say.
        whose: Who expects it, "plan" or "receipt".
        misnamed: The names that a wrong conversion would have written; how many of these are
            missing is the control. None for no control.

    Returns:
        A check whose value is the number of tensors that differ.
    """
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in target.tensors.items()}
    every = sorted(expected.keys() | stored.keys())
    wrong = [name for name in every if expected.get(name) != stored.get(name)]
    # A file that is damaged may still name every tensor.
    reasons = [problem.message for problem in target.blocking_problems] + config_mismatches(
        target, params
    )
    if wrong:
        shown = (
            f"{name}: expected {expected.get(name)}, found {stored.get(name)}" for name in wrong
        )
        reasons.append(f"{len(wrong)} tensors differ from the {whose}: {first_few(list(shown), 3)}")
    detail = f"{len(stored)} tensors with the {whose}'s names, shapes and dtypes"
    control = None if misnamed is None else float(sum(name not in stored for name in misnamed))
    value = float(max(len(wrong), len(reasons)))
    return Check("structure", not reasons, value, control, "; ".join(reasons[:3]) or detail)
