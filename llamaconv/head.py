"""The output head: tied to the embedding, stored or not, and what a target makes of it.

Hugging Face leaves a tied head out, TorchTitan and Meta want both. A head that should be tied
and differs is an error until the user chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamaconv.compare import same_bytes
from llamaconv.params import LlamaParams
from llamaconv.pieces import TensorInfo
from llamaconv.plan import Target
from llamaconv.problems import Problem

EMBEDDING, HEAD = "tok_embeddings", "output"

Sources = Mapping[tuple[str, int | None], TensorInfo]


@dataclass
class Head:
    """What becomes of embedding and head.

    ``sources`` are the tensors by role, with the two exchanged as decided. By role, reasons:
    ``written`` from the other, ``replaced`` by the other, ``left_out`` of the target.
    """

    sources: dict[tuple[str, int | None], TensorInfo]
    params: LlamaParams
    written: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def resolve_head(known: Sources, params: LlamaParams, target: Target) -> Head:
    """Decides by ``params.tied``, what is stored, and the option ``tie`` of the target."""
    embedding, head = known.get((EMBEDDING, None)), known.get((HEAD, None))
    was_tied, tie = params.tied, target.tie
    if tie != "auto":
        params = replace(params, tied=tie != "untie")
    result = Head(dict(known), params)
    if embedding is None or (head is None and not was_tied and tie != "embedding"):
        return result  # what is missing is reported as missing
    if head is None and tie == "head":
        result.problems.append(
            Problem("--tie head: the source has no head to take; use --tie embedding")
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
    elif was_tied and tie == "auto" and not same_bytes(embedding, head):
        result.problems.append(
            Problem(
                f"the parameters tie the head to the embedding, but {head.name} and "
                f"{embedding.name} differ. Choose: --tie embedding, --tie head, or --tie untie to "
                "keep both",
                (head.name, embedding.name),
            )
        )
    if target.to == "hf" and params.tied:
        result.left_out[HEAD] = "tied: Hugging Face stores it once, as the embedding"
        result.sources.pop((HEAD, None), None)
        result.written.pop(HEAD, None)
    return result
