"""Two checkpoints brought to one form: their tensors by role and layer, with one description."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llamaconv.checkpoint.address import local, path_or_address
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.names import FUSED, ROLE_ORDER, identify, why_needless
from llamaconv.model.params import LlamaParams
from llamaconv.plan.assets import find_assets
from llamaconv.plan.target import Target
from llamaconv.report.errors import RefusedError

Place = tuple[str, int | None]
"""Role and layer; for unknown tensors the name, and None."""


@dataclass
class Side:
    """One checkpoint.

    Attributes:
        checkpoint: The checkpoint, without fused matrices. If no file states its parameters, it has
            those of the other side.
        stated: The parameters that its own files state.
        tensors: Its tensors by place.
    """

    checkpoint: Checkpoint
    stated: LlamaParams | None
    tensors: dict[Place, TensorInfo]


def open_sides(
    one: str | Path, other: str | Path, assets: str = ""
) -> tuple[tuple[Side, Side], list[str]]:
    """Open two local checkpoints.

    Args:
        one: A checkpoint of any format.
        other: Another one.
        assets: A folder with config.json, for sides whose files do not state their parameters,
            such as the steps of a training run.

    Returns:
        Both sides, and what was done to bring them together.

    Raises:
        RefusedError: A side cannot be opened or is on the Hub, the number of heads is needed and
            neither side states it, or they have no tensor in common.
    """
    for path in (one, other):
        local(path_or_address(path))
    opened = [open_checkpoint(path) for path in (one, other)]
    params = opened[0].params or opened[1].params
    if params is None:
        params = _params_beside(opened[0], assets)
    a, b = (_side(checkpoint, params) for checkpoint in opened)
    _refuse_unsplit([a, b])
    notes = _share_tied_heads([a, b])
    if a.tensors.keys().isdisjoint(b.tensors):
        raise RefusedError(
            f"{one} and {other}: no tensor is in both. Check that both are Llamas, with inspect"
        )
    return (a, b), notes


def _params_beside(checkpoint: Checkpoint, assets: str) -> LlamaParams | None:
    """Return the parameters of ``assets``, or of a config.json next to a DCP; None without."""
    target = Target(to="hf", assets=assets)
    found = find_assets(replace(checkpoint, problems=()), target).source
    if assets and found.params is None:
        raise RefusedError(found.errors)
    return found.params


def _side(checkpoint: Checkpoint, params: LlamaParams | None) -> Side:
    stated = checkpoint.params
    checkpoint = split_fused(replace(checkpoint, params=stated or params))
    tensors: dict[Place, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        known = identify(name, checkpoint.naming)
        place: Place = (known[0].name, known[1]) if known else (name, None)
        if known and place in tensors:
            place = (name, None)
        if known or not why_needless(name):
            tensors[place] = tensor
    last = len(ROLE_ORDER)
    in_order = sorted(
        tensors, key=lambda place: (ROLE_ORDER.get(place[0], last), place[1] or 0, place[0])
    )
    return Side(checkpoint, stated, {place: tensors[place] for place in in_order})


def _refuse_unsplit(sides: list[Side]) -> None:
    """Raise `RefusedError` if only one side has q, k and v as one tensor, and no file says how."""
    for side, there in (sides, sides[::-1]):
        found = [place for place in side.tensors if place[0] in FUSED]
        if found and not any(place in there.tensors for place in found):
            raise RefusedError(
                f"{side.checkpoint.path}: stores q, k and v as one tensor, and no file states the "
                "number of heads. Pass a folder with the model's config.json with --assets"
            )


def _share_tied_heads(sides: list[Side]) -> list[str]:
    """Let the embedding stand for a tied head that only one side stores; say so."""
    head, embedding = ("output", None), ("tok_embeddings", None)
    notes = []
    for which, side, there in zip(("first", "second"), sides, sides[::-1], strict=True):
        params = side.checkpoint.params
        if head in side.tensors or head not in there.tensors or embedding not in side.tensors:
            continue
        if params is not None and params.tied:
            side.tensors[head] = side.tensors[embedding]
            notes.append(f"the {which} stores no head, which is tied to its embedding")
    return notes
