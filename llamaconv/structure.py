"""The structure of a target: names, shapes, stored dtypes, and what stands beside the weights.

`verify` compares it with a plan, `receipt_check` with a receipt.
"""

from __future__ import annotations

from collections.abc import Mapping

from llamaconv.checks import Check
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.problems import some
from llamaconv.stated import stated_otherwise

Expected = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor, by its name."""


def check_structure(
    target: Checkpoint,
    expected: Expected,
    params: LlamaParams,
    whose: str,
    misnamed: tuple[str, ...] | None = None,
) -> Check:
    """Compare the tensors of ``target``, and the files beside them, with what is expected.

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
    reasons = [problem.message for problem in target.faults] + stated_otherwise(target, params)
    if wrong:
        shown = (
            f"{name}: {expected.get(name)} expected, {stored.get(name)} found" for name in wrong
        )
        reasons.append(
            f"{len(wrong)} tensors are not as the {whose} has them: {some(list(shown), 3)}"
        )
    detail = f"{len(stored)} tensors with the {whose}'s names, shapes and dtypes"
    control = None if misnamed is None else float(sum(name not in stored for name in misnamed))
    value = float(max(len(wrong), len(reasons)))
    return Check("structure", not reasons, value, control, "; ".join(reasons[:3]) or detail)
