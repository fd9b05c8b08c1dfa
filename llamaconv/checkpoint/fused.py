"""Take tensors that hold several roles apart, where their rows lie.

TorchTitan's main branch stores two tensors of a layer so (`llamaconv.model.names.FUSED`):

- ``wqkv`` is a matrix: for each kv head the query heads that share it, then its key head, then its
  value head, ``head_dim`` rows each. No checkpoint states how many heads there are, so the model's
  parameters are needed. Some nightlies of 2026 saved it too, beside w1 and w3.
- ``w13`` is [2, ffn_dim, dim]: 0 is w1 (gate), 1 is w3 (up).

Parts are runs of rows of the stored pieces, so that no byte is moved. `strips` says how the same
rows are joined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.names import FUSED, GENERATIONS, ROLES, Role, identify, readings
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import Problem, first_few

_NAME = re.compile(
    r"(?:model\.)?layers\.([0-9]{1,9})\."
    r"(?:attention\.(?:qkv_linear\.)?(wqkv)|feed_forward\.(w13))\.weight"
)

Strip = tuple[str, int, int]
"""A role, and which of its rows, half-open."""


def is_fused(name: str) -> bool:
    """Return whether ``name`` is that of a tensor with several roles, in any generation."""
    return fused_role(name) is not None


def fused_role(name: str) -> tuple[Role, int] | None:
    """Return role and layer of a fused tensor, whose name may have wrappers; None for others."""
    matches = (_NAME.fullmatch(bare) for bare, _ in readings(name))
    found = next(filter(None, matches), None)
    return found and (FUSED[found[2] or found[3]], int(found[1]))


def strips(fused: str, params: LlamaParams) -> list[Strip]:
    """Return what a tensor of `FUSED` consists of, in the order in which it is stored."""
    if fused == "w13":
        return [("w1", 0, params.ffn_dim), ("w3", 0, params.ffn_dim)]
    size = params.head_dim
    group = params.n_heads // params.n_kv_heads * size
    return [
        strip
        for head in range(params.n_kv_heads)
        for strip in (
            ("wq", head * group, (head + 1) * group),
            ("wk", head * size, (head + 1) * size),
            ("wv", head * size, (head + 1) * size),
        )
    ]


def split_fused(source: Checkpoint, params: LlamaParams | None = None) -> Checkpoint:
    """Return ``source`` with the parts of each fused tensor instead of it.

    Args:
        source: The checkpoint.
        params: The model's parameters, if they are not the checkpoint's own. Without any, a
            ``wqkv`` stays as it is.
    """
    params, naming = params or source.params, source.naming
    if naming is None or not any(map(is_fused, source.tensors)):
        return source
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, tensor in source.tensors.items():
        found = fused_role(name)
        if found is None or (found[0].name == "wqkv" and params is None):
            tensors[name] = tensor
            continue
        role, layer = found
        names = [str(ROLES[part].in_naming(naming, layer)) for part in role.parts]
        if wrong := _wrong_shape(role, tensor, params):
            problems.append(Problem(f"{name}: {wrong}", (name, *names)))
            continue
        tensors |= {part.name: part for part in parts_of(tensor, role, names, params)}
    return replace(source, tensors=tensors, problems=(*source.problems, *problems))


def parts_of(
    tensor: TensorInfo, role: Role, names: Sequence[str], params: LlamaParams | None
) -> Iterator[TensorInfo]:
    """Yield the parts of a tensor of the shape of ``role``, one of `FUSED`.

    Args:
        tensor: The stored tensor.
        role: What it holds.
        names: What to call the parts, in the order of ``role.parts``.
        params: The model's parameters; None is enough for a ``w13``.
    """
    for number, (part, name) in enumerate(zip(role.parts, names, strict=True)):
        if role.name == "w13":
            rows = tensor.slab(name, number)
        else:
            assert params is not None
            rows = tensor.rows_of(name, _runs(part, params))
        yield replace(rows, stored=tensor.name)


def _runs(part: str, params: LlamaParams) -> list[tuple[int, int]]:
    """Return which rows of a ``wqkv`` are those of a role, half-open, in order."""
    runs, at = [], 0
    for role, first, last in strips("wqkv", params):
        if role == part:
            runs.append((at, at + last - first))
        at += last - first
    return runs


def _wrong_shape(role: Role, tensor: TensorInfo, params: LlamaParams | None) -> str:
    """Return why a fused tensor cannot be taken apart; "" if it can."""
    shape = list(tensor.shape)
    if role.name == "w13":
        if len(shape) == 3 and shape[0] == 2:
            return ""
        expected = list(role.shape(params)) if params else "[2, ffn_dim, dim]"
        reason = (
            ". For some days of September 2026 nightlies kept w1 and w3 in one matrix, row by row "
            "in turn, and split it when they saved, so no checkpoint should hold it; save it again "
            "with TorchTitan's main branch of 2026-09-21 or later"
            if len(shape) == 2
            else ""
        )
        return f"expected shape {expected}, w1 and then w3; found {shape}{reason}"
    assert params is not None
    expected = list(role.shape(params))
    if shape == expected:
        return ""
    return (
        f"expected shape {expected} for {params.n_heads} heads and {params.n_kv_heads} kv heads of "
        f"{params.head_dim}, found {shape}; the parameters belong to another model"
    )


def mixed_generations(names: Iterable[str], naming: str | None) -> Iterator[Problem]:
    """Yield an error if a checkpoint has the names of several generations.

    Args:
        names: The tensors' names.
        naming: The naming that most of them fit.
    """
    if naming not in GENERATIONS:
        return
    names = list(names)
    others: dict[str, list[str]] = {}
    layers: dict[str, dict[int | None, str]] = {}
    for name in names:
        found: tuple[Role, int | None] | None = fused_role(name)
        if found is None and (found := identify(name, naming)) is None:
            other = next((one for one in GENERATIONS if identify(name, one)), None)
            if other is not None:
                others.setdefault(other, []).append(name)
                found = identify(name, other)
        if found:
            layers.setdefault(found[0].name, {})[found[1]] = name
    for fused in FUSED.values():
        # A nightly may have fused one of the two alone, but then in every layer.
        joined = list(layers.get(fused.name, {}).values())
        apart = [one for part in fused.parts for one in layers.get(part, {}).values()]
        if joined and apart:
            yield _mixed(f"{fused.name} and {', '.join(fused.parts)}", joined, apart)
            return
    for other, found_there in others.items():
        rest = [name for name in names if name not in set(found_there)]
        yield _mixed(f"{naming} and {other}", rest, found_there)
        return


def _mixed(what: str, some: Sequence[str], others: Sequence[str]) -> Problem:
    return Problem(
        f"the names of several generations in one checkpoint, {what}: {first_few(some, 2)}; "
        f"{first_few(others, 2)}. Two releases of TorchTitan have saved to this folder; save the "
        "model again with one of them, to a new folder",
        (*some, *others),
        explains_missing=True,
    )
