"""Decide what becomes of the embedding and the output head, which may be tied.

Hugging Face stores a tied head once, as the embedding; TorchTitan and Meta store both. If the
parameters tie the head and the two tensors differ, the user must choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamaconv.checkpoint.reader import same_bytes
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.params import LlamaParams
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem

EMBEDDING, HEAD = "tok_embeddings", "output"


@dataclass
class TiedHead:
    """What becomes of embedding and head.

    Attributes:
        sources: Source tensors by role name and layer, with the two exchanged as decided.
        params: The target's parameters.
        written: By role name, why it is written from the other one.
        replaced: By role name, why the other one is used instead.
        left_out: By role name, why the target has no such tensor.
        problems: A conflict, or a choice that is not possible.
    """

    sources: dict[tuple[str, int | None], TensorInfo]
    params: LlamaParams
    written: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def resolve_head(
    known: Mapping[tuple[str, int | None], TensorInfo], params: LlamaParams, target: Target
) -> TiedHead:
    """Decide by ``params.tied``, the stored tensors, and the option ``tie`` of ``target``."""
    embedding, head = known.get((EMBEDDING, None)), known.get((HEAD, None))
    was_tied, tie = params.tied, target.tie
    if tie != "auto":
        params = replace(params, tied=tie != "untie")
    result = TiedHead(dict(known), params)
    if embedding is None or (head is None and not was_tied and tie != "embedding"):
        return result  # what is missing is reported as missing
    if head is None and tie == "head":
        result.problems.append(
            Problem("--tie head: the source stores no head. Use --tie embedding")
        )
    elif head is None:
        result.sources[HEAD, None] = embedding
        result.written[HEAD] = "tied to the embedding and not stored: written from it"
    elif tie == "embedding":
        result.sources[HEAD, None] = embedding
        result.written[HEAD] = "--tie embedding: written from the embedding"
        result.replaced[HEAD] = "--tie embedding: replaced by the embedding"
    elif tie == "head":
        result.sources[EMBEDDING, None] = head
        result.written[EMBEDDING] = "--tie head: written from the head"
        result.replaced[EMBEDDING] = "--tie head: replaced by the head"
    elif was_tied and tie == "auto" and not (embedding.is_here and head.is_here):
        result.problems.append(
            Problem(
                f"the parameters tie the head to the embedding, but {head.name} is stored too. "
                "Headers alone do not show whether it equals the embedding. Choose: --tie embedding "
                "(as transformers computes), --tie head, or --tie untie to keep both",
                (head.name, embedding.name),
            )
        )
    elif was_tied and tie == "auto" and not same_bytes(embedding, head):
        result.problems.append(
            Problem(
                f"the parameters tie the head to the embedding, but {head.name} and "
                f"{embedding.name} differ. Choose: --tie embedding, --tie head, or --tie untie to "
                "keep both",
                (head.name, embedding.name),
            )
        )
    if target.format == "huggingface" and params.tied:
        result.left_out[HEAD] = "tied: Hugging Face stores it once, as the embedding"
        result.sources.pop((HEAD, None), None)
        result.written.pop(HEAD, None)
    return result
