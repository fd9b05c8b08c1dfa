"""Compare logits and loss of the reference model on both sides of a conversion.

Shape suffixes: B batch, P position, V vocabulary.

Limit: both sides are whole in memory, in float32, so only small models are run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamaconv.model import forward
from llamaconv.plan.plan import Plan
from llamaconv.sample import held_out_text
from llamaconv.verify.bits_and_scores import other_layout
from llamaconv.verify.independent_readers import IndependentReader
from llamaconv.verify.results import Check

MOST_BYTES = 64_000_000
"""Bytes of the largest side that is run, as stored."""

_MOST_TOKENS = 512
# Logits of the two layouts differ only by the rounding of float32 sums.
_TOLERANCE = 1e-3


def check_logits(plan: Plan, here: IndependentReader, there: IndependentReader) -> list[Check]:
    """Run both sides on the sample's held-out text.

    Args:
        plan: The plan of the conversion.
        here: Reads the source.
        there: Reads the target.

    Returns:
        Two checks: the largest relative difference of logits, and the difference of the loss in
        nats per token. The control uses the rotation of the other layout.

    Raises:
        FailedError: A reader failed.
    """
    params, layout = plan.ready()
    source: dict[tuple[str, int | None], Tensor] = {}
    target: dict[tuple[str, int | None], Tensor] = {}
    for move in plan.written:
        dtype, n_rows = getattr(torch, move.dtype), move.shape[0]
        source[move.place] = here.rows(move.source, 0, n_rows).to(dtype, copy=True)
        target[move.place] = there.rows(move.target_name, 0, n_rows).clone()
    here.close()
    there.close()
    for side in (source, target):
        # A tied head that is not stored is the embedding.
        side.setdefault(("output", None), side["tok_embeddings", None])
    # A loss needs a second token, however few positions the model has.
    n_tokens = max(2, min(_MOST_TOKENS, params.max_position or _MOST_TOKENS))
    text = torch.tensor(list(held_out_text()[:n_tokens])) % params.vocab_size
    tokens_BP = text.unsqueeze(0)
    with torch.no_grad():
        right_BPV = forward.forward(source, params, tokens_BP, layout)
        found_BPV = forward.forward(target, params, tokens_BP, plan.target.layout)
        wrong_BPV = forward.forward(source, params, tokens_BP, other_layout(layout))
    largest = max(1.0, right_BPV.abs().max().item())
    value, control = (
        (side - right_BPV).abs().max().item() / largest for side in (found_BPV, wrong_BPV)
    )
    logits = f"largest difference on {n_tokens} tokens, logits up to {largest:.2g}"
    if params.rope_type:
        logits += f", without {params.rope_type} scaling on either side"
    right, found, wrong = (
        forward.loss(side, tokens_BP).item() for side in (right_BPV, found_BPV, wrong_BPV)
    )
    loss = f"source {right:.2f}, target {found:.2f}; with rows in the other layout {wrong:.2f}"
    off, wrong_off = abs(found - right), abs(wrong - right)
    return [
        Check("logits", value <= _TOLERANCE, value, control, logits, _TOLERANCE),
        Check("loss", off <= _TOLERANCE, off, wrong_off, loss, _TOLERANCE),
    ]
