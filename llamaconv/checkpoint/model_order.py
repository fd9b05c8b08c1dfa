"""Tensors in the order of a forward pass, and the layers of a model folded into one row per role.

Files list tensors alphabetically: the head first, layer 10 before layer 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.names import ROLE_ORDER, identify
from llamaconv.report.tables import size

# The number of a layer, or of whatever an unknown name counts.
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_LAYER = re.compile(r"(?<=\blayers\.)[0-9]{1,9}(?=\.)")


def in_order(tensors: Iterable[TensorInfo], naming: str | None) -> list[TensorInfo]:
    """Return the tensors in the order of a forward pass, unknown names last."""

    def key(tensor: TensorInfo) -> tuple[int, int, float, str]:
        known = identify(tensor.name, naming)
        if known is None:
            return (3, 0, 0, tensor.name)
        role, layer = known
        if layer is not None:
            return (1, layer, ROLE_ORDER[role.name], tensor.name)
        return (0 if role.name == "tok_embeddings" else 2, 0, ROLE_ORDER[role.name], tensor.name)

    return sorted(tensors, key=key)


def where(files: Sequence[str]) -> str:
    """Return the file of a tensor for a table; of several, the first and their number."""
    if len(files) < 2:
        return files[0] if files else ""
    return f"{len(files)} files, {files[0]} first"


def folded_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by what they are without the numbers of layers, ``layers.{0..3}.x``, in order."""
    groups: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name in names:
        start, number, end = _cut(name)
        groups.setdefault((start, end), []).append((name, number))
    return {
        f"{start}{_ranges([n for _, n in found if n is not None])}{end}": [
            name for name, _ in found
        ]
        for (start, end), found in groups.items()
    }


def folded_rows(tensors: Iterable[TensorInfo], naming: str | None) -> list[tuple[str, ...]]:
    """Return one row for all layers of one role, shape and dtype, in the order of a forward pass.

    Each row is the name with the numbers of its layers, how many tensors it stands for, dtype,
    shape, bytes of all of them, and file.
    """
    groups: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[TensorInfo, int | None]]] = {}
    for tensor in in_order(tensors, naming):
        start, number, end = _cut(tensor.name)
        groups.setdefault((start, end, tensor.dtype, tensor.shape), []).append((tensor, number))
    # A role whose dtype changes in a later layer stays next to itself.
    firsts: dict[tuple[str, str], int] = {}
    for at, (start, end, *_) in enumerate(groups):
        firsts.setdefault((start, end), at)
    rows: list[tuple[str, ...]] = []
    for (start, end, dtype, shape), found in sorted(
        groups.items(), key=lambda item: firsts[item[0][:2]]
    ):
        alike = [tensor for tensor, _ in found]
        numbers = [number for _, number in found if number is not None]
        files = dict.fromkeys(file for tensor in alike for file in tensor.files)
        rows.append(
            (
                f"{start}{_ranges(numbers)}{end}",
                f"{len(alike):,}",
                dtype,
                " × ".join(map(str, shape)),
                size(sum(tensor.nbytes for tensor in alike)),
                *(files if len(files) == 1 else [f"{len(files)} files"]),
            )
        )
    return rows


def _cut(name: str) -> tuple[str, int | None, str]:
    """Return what is before the number of the layer in ``name``, the number, and what is after."""
    # The text of a number with leading zeros is another name.
    match = _LAYER.search(name) or _NUMBER.search(name)
    if match is None or str(int(match[0])) != match[0]:
        return name, None, ""
    return name[: match.start()], int(match[0]), name[match.end() :]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``{0..3,5}`` for 0, 1, 2, 3 and 5; a single number as it is."""
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("..".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
