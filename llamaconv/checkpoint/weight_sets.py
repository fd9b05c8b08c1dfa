"""The sets of weights in a folder: which one transformers loads, and how the others differ from it.

A folder may hold the same model several times, or a new one next to the remains of an old one.
What transformers itself would load is read; the others are compared with it from headers, and
from the first bytes of each tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llamaconv.checkpoint.folder import Folder, matching
from llamaconv.checkpoint.huggingface_index import (
    BIN,
    SAFETENSORS,
    Kind,
    WeightMap,
    read_weight_map,
)
from llamaconv.checkpoint.reader import same_bytes
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.names import ROLES, identify
from llamaconv.report.errors import Problem, collect_problems, first_few

_COMPARED_BYTES = 64 << 10

Place = tuple[str, int | None]
"""Role name and layer of a tensor."""


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of a folder.

    Attributes:
        name: The file, the index, or the pattern of the files that no index names.
        kind: The kind of its files.
        files: Its files; empty for a set with an index, which names them.
        index: The index, if it has one that can be read.
        problems: Why the index cannot be read.
    """

    name: str
    kind: Kind
    files: tuple[str, ...] = ()
    index: WeightMap | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def named_files(self) -> set[str]:
        """Its files, with or without an index."""
        return {*self.files, *(self.index.files.values() if self.index else ())}


def weight_sets(folder: Folder, explicit: object, but: list[str]) -> list[WeightSet]:
    """Return the sets in the order in which transformers looks for them.

    Its order (5.24.0, modeling_utils._get_resolved_checkpoint_files): what config.json names as
    ``transformers_weights``, then for safetensors and for torch's files the single file before the
    index. It ignores all other files; here they come last.

    Args:
        folder: The folder.
        explicit: ``transformers_weights`` of config.json, whatever it is.
        but: Files that are no weights of a model.
    """
    names: dict[str, Kind] = {}
    if isinstance(explicit, str) and folder.is_file(explicit):
        names[explicit] = SAFETENSORS
    for kind in (SAFETENSORS, BIN):
        for name in filter(folder.is_file, (kind.single, kind.index)):
            names.setdefault(name, kind)
    for name in matching(folder, "*.safetensors.index.json"):
        names.setdefault(name, SAFETENSORS)
    sets = [_named(folder, name, kind) for name, kind in names.items()]
    taken = {*but, *(file for one in sets for file in one.named_files)}
    for kind in (SAFETENSORS, BIN):
        if rest := tuple(file for file in matching(folder, kind.files) if file not in taken):
            sets.append(WeightSet(rest[0] if len(rest) == 1 else kind.files, kind, rest))
    return sets


def one_file(folder: Folder, name: str) -> WeightSet:
    """Return the set that one file of weights, or one index, stands for."""
    return _named(folder, name, SAFETENSORS if ".safetensors" in name else BIN)


def _named(folder: Folder, name: str, kind: Kind) -> WeightSet:
    if not name.endswith(".index.json"):
        return WeightSet(name, kind, (name,))
    problems: list[Problem] = []
    index = collect_problems(lambda: read_weight_map(folder, name), problems)
    return WeightSet(name, kind, (), index, tuple(problems))


def naming_of(names: Mapping[str, TensorInfo]) -> str:
    """Return the naming of ``names``: Meta's if most of them fit it, else Hugging Face's."""
    n_metas, n_others = (
        sum(identify(name, naming) is not None for name in names)
        for naming in ("meta", "huggingface")
    )
    return "meta" if n_metas > n_others and 2 * n_metas > len(names) else "huggingface"


def by_place(tensors: Mapping[str, TensorInfo], naming: str) -> dict[Place, TensorInfo]:
    """Return the tensors of a Llama among ``tensors``, by role name and layer."""
    found = ((identify(name, naming), tensor) for name, tensor in tensors.items())
    return {(known[0].name, known[1]): tensor for known, tensor in found if known}


def is_complete(found: Collection[Place]) -> bool:
    """Return whether the places ``found`` are a whole Llama of some number of layers; it may lack a head."""
    layers = {layer for _, layer in found if layer is not None}
    needed = {
        (role.name, layer)
        for role in ROLES.values()
        if not role.optional and role.name != "output"
        for layer in (range(max(layers, default=0) + 1) if role.per_layer else (None,))
    }
    return needed <= set(found)


def difference(
    one: Mapping[Place, TensorInfo], other: Mapping[Place, TensorInfo], same_rows: bool
) -> str:
    """Return how two sets of tensors differ, as a phrase; "" if nothing differs.

    Args:
        one: The tensors of one set.
        other: Those of the other.
        same_rows: Whether q and k have their rows in the same order in both.
    """
    # A tied head need not be stored.
    apart = (one.keys() ^ other.keys()) - {("output", None)}
    if apart:
        names = sorted((one.get(place) or other[place]).name for place in apart)
        return f"{len(names)} tensors are in one of them only ({first_few(names, 2)})"
    pairs = [(one[place], other[place], ROLES[place[0]]) for place in one.keys() & other.keys()]
    for what in ("shape", "dtype"):
        unlike = [(a, b) for a, b, _ in pairs if getattr(a, what) != getattr(b, what)]
        if unlike:
            a, b = unlike[0]
            return (
                f"{len(unlike)} tensors differ in {what}: {a.name} is {getattr(a, what)} in one and "
                f"{getattr(b, what)} in the other"
            )
    changed = [
        a.name
        for a, b, role in pairs
        if (same_rows or not role.heads)
        and a.is_here
        and b.is_here
        and not same_bytes(a, b, _COMPARED_BYTES)
    ]
    if changed:
        return f"{len(changed)} of {len(pairs)} tensors differ in their values: {first_few(changed, 2)}"
    return ""
