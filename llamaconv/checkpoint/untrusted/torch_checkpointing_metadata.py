"""``metadata.pkl`` of a torch_checkpointing folder, with every value checked; without torch.

It is a pickle of dicts, lists, tuples, numbers and texts, so no name at all is admitted in it (see
`pickle_data`). Two versions of it exist (torch_checkpointing/distributed_metadata.py, 0.1.1):

- "2.0": ``metadata`` has for each item, such as ``model`` or ``optimizer``, the tensors by their
  path within the item (a JSON list), and the file and format of each rank.
- "1.0": ``metadata`` has the tensors of all items by a path that begins with the item, and
  ``rank_to_layout_info_mappings`` has for each rank the file and format of each item.

For each tensor both have one or several descriptions of how it is cut, with the ranks that each
description is for. An item that was saved without a resharder is not described at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from llamaconv.checkpoint.tensors import DTYPE_BYTES
from llamaconv.checkpoint.untrusted.files import open_file, parse_json
from llamaconv.checkpoint.untrusted.pickle_data import ForbiddenNameError, read
from llamaconv.checkpoint.untrusted.placements import Box, Cut, boxes
from llamaconv.checkpoint.untrusted.values import is_bare_name, is_whole, sizes
from llamaconv.report.errors import RefusedError

NAME = "metadata.pkl"
VERSIONS = ("1.0", "2.0")
NEWEST = "0.1.1"
"""The newest torch_checkpointing whose checkpoints were tested."""

_MOST_BYTES = 1 << 30
# Of one tensor. 405B on 16384 ranks has as many.
_MOST_RANKS = 1 << 20
_MOST_PARTS = 1 << 25

Nested = tuple[str | int, ...]
"""The keys and places that lead to a tensor within its item."""

Kind = Literal["torch", "safetensors", "other"]
_KINDS: Mapping[object, Kind] = {
    "TorchSerialization": "torch",
    "SafetensorsSerialization": "safetensors",
    "JsonSerialization": "other",
    "RawSerialization": "other",
}


@dataclass(frozen=True, slots=True)
class RankFile:
    """Where a rank saved an item: the file, below the checkpoint, and its format."""

    file: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a tensor.

    Attributes:
        rank: The rank.
        shape: The shape of its part; None if it is at least what ``boxes`` need.
        boxes: The rectangles of the tensor that are in its part.
    """

    rank: int
    shape: tuple[int, ...] | None
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is cut for some ranks.

    Attributes:
        dtype: Torch's name of its dtype.
        shape: The shape of the whole.
        ranks: The ranks that this is for.
        mesh: The extent of the mesh along each of its dimensions.
        members: The ranks of the mesh, row by row.
        cuts: For each dimension of the mesh the axis that it cuts and the factor of a strided cut;
            None for a copy each.
        boxes: The rectangles that each of the ranks holds, if they are listed; None with a mesh.
    """

    dtype: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    mesh: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    cuts: tuple[tuple[int, int] | None, ...] = ()
    boxes: tuple[Box, ...] | None = None

    def parts(self) -> Iterator[Part]:
        """Yield what each rank holds. Raises ``ValueError`` if a cut is absurd."""
        if self.boxes is not None:
            for rank in self.ranks:
                yield Part(rank, None, self.boxes)
            return
        wanted = set(self.ranks)
        places = product(*map(range, self.mesh))
        for rank, place in zip(self.members, places, strict=True):
            if rank in wanted:
                yield Part(rank, *self._held(place))

    def _held(self, place: Sequence[int]) -> tuple[tuple[int, ...], tuple[Box, ...]]:
        axes: list[list[Cut]] = [[] for _ in self.shape]
        for extent, index, cut in zip(self.mesh, place, self.cuts, strict=True):
            if cut is not None:
                axes[cut[0]].append(Cut(extent, index, cut[1]))
        shape, found = boxes(self.shape, axes)
        return shape, tuple(found)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of an item: its path there, and how it is cut, or why that cannot be read."""

    item: str
    path: Nested
    shardings: tuple[Sharding, ...]
    unknown: str = ""

    @property
    def name(self) -> str:
        """The parts of the path with dots between them; the item's own name without a path."""
        return ".".join(map(str, self.path)) or self.item


@dataclass(frozen=True)
class Metadata:
    """The contents of ``metadata.pkl``: its version, every tensor, the file of each item and rank."""

    version: str
    n_ranks: int
    tensors: tuple[StoredTensor, ...]
    files: Mapping[tuple[str, int], RankFile]


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``.

    Raises:
        RefusedError: There is none, it names what no checkpoint needs, it is damaged, or of a
            version that is not known.
    """
    path = folder / NAME
    try:
        with open_file(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if not 0 < n_bytes <= _MOST_BYTES:
                raise ValueError(f"it has {n_bytes} bytes")
            return _metadata(read(file.read(), admitted=()))
    except FileNotFoundError as error:
        raise RefusedError(f"{path}: not found; torch_checkpointing writes one") from error
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror or error}") from error
    except ForbiddenNameError as error:
        raise RefusedError(
            f"{path}: it asks for {error}, but the metadata of torch_checkpointing is plain values. "
            "The file is damaged or hostile, and was not opened"
        ) from None
    except ValueError as error:
        raise RefusedError(f"{path}: not metadata of torch_checkpointing: {error}") from error


def _metadata(value: Any) -> Metadata:
    state = _dict(value, "it")
    if "metadata" not in state or "world_size" not in state:
        raise ValueError("it has no entries 'metadata' and 'world_size'; another program wrote it")
    # The package takes an absent version for the first.
    version = state.get("version", "1.0")
    if version not in VERSIONS:
        raise ValueError(
            f"its version is {version!r}; {' and '.join(VERSIONS)} are known, as of "
            f"torch_checkpointing {NEWEST}"
        )
    n_ranks = state["world_size"]
    if not is_whole(n_ranks) or not 0 < n_ranks <= _MOST_RANKS:
        raise ValueError(f"its world_size is {n_ranks!r}")
    items = _dict(state["metadata"], "'metadata'")
    found: dict[str, Mapping[Any, Any]] = {}
    layouts: dict[str, Mapping[Any, Any]] = {}
    if version == "2.0":
        for item, entry in items.items():
            fields = _dict(entry, f"item {item!r}")
            found[_item(item)] = _dict(fields.get("nested_path_to_metadata"), f"item {item!r}")
            layouts[item] = _dict(fields.get("rank_to_layout_info"), f"the files of {item!r}")
    else:
        whole: dict[str, dict[Any, Any]] = {}
        for text, groups in items.items():
            item, *path = _path(text) or ("",)
            whole.setdefault(_item(item), {})[tuple(path)] = groups
        found = dict(whole)
        of_ranks = _dict(state.get("rank_to_layout_info_mappings"), "the list of files")
        for item in found:
            layouts[item] = {
                rank: _dict(files, f"the files of rank {rank}").get(item)
                for rank, files in of_ranks.items()
            }
    files = {
        (item, rank): file for item in found for rank, file in _files(item, layouts[item], n_ranks)
    }
    _check_distinct(files)
    _check_size(groups for of_item in found.values() for groups in of_item.values())
    tensors = tuple(
        _tensor(item, path if type(path) is tuple else _path(path), groups, n_ranks)
        for item, of_item in found.items()
        for path, groups in of_item.items()
    )
    return Metadata(version, n_ranks, tensors, files)


def _item(name: object) -> str:
    if not is_bare_name(name):
        raise ValueError(f"the name of an item is {name!r}")
    return name


def _dict(value: Any, what: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what} is not a dict")
    return value


def _path(text: object) -> Nested:
    """Return a path, which is a JSON list of names and places."""
    if type(text) is not str:
        raise ValueError("the name of a tensor is not text")
    path = parse_json(text.encode("utf-8", "surrogatepass"))
    if type(path) is not list or not all(type(part) in (str, int) for part in path):
        raise ValueError(f"the name of a tensor is {text[:60]}")
    return tuple(path)


def _files(item: str, layouts: Mapping[Any, Any], n_ranks: int) -> Iterator[tuple[int, RankFile]]:
    ranks = {int(rank) if type(rank) is str and rank.isdecimal() else rank for rank in layouts}
    if len(layouts) != n_ranks or ranks != set(range(n_ranks)):
        raise ValueError(
            f"it was saved by {n_ranks} ranks, but lists the files of {item!r} for others "
            f"({len(layouts)} ranks)"
        )
    for rank, layout in layouts.items():
        yield int(rank), _file(item, int(rank), layout)


def _file(item: str, rank: int, layout: Any) -> RankFile:
    if layout is None:
        return RankFile(f"{item}_{rank}.pt", "torch")
    fields = _dict(layout, f"the file of {item!r}, rank {rank},")
    file, kind = fields.get("file_path"), fields.get("serialization_format")
    if type(file) is not str or not all(map(is_bare_name, file.split("/"))):
        raise ValueError(f"the file {file!r} of {item!r} is outside the checkpoint")
    name = _dict(kind, f"the format of {file}").get("type")
    if type(name) is not str or name not in _KINDS:
        raise ValueError(
            f"{file} has the format {name!r}, which torch_checkpointing {NEWEST} lacks"
        )
    return RankFile(file, _KINDS[name])


def _check_distinct(files: Mapping[tuple[str, int], RankFile]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for (item, rank), file in files.items():
        other = seen.setdefault(file.file, (item, rank))
        if other != (item, rank):
            raise ValueError(
                f"{file.file} is the file of {other[0]!r}, rank {other[1]}, and of {item!r}, rank {rank}"
            )


def _check_size(tensors: Iterable[Any]) -> None:
    """Raise ``ValueError`` for more ranks in all than any checkpoint has: values may be shared."""
    left = _MOST_PARTS
    for groups in tensors:
        for group in groups if type(groups) is list else ():
            try:
                mesh = group["sharding_metadata"]["data"].get("mesh_spec") or {}
                left -= len(group["ranks"]) + len(mesh.get("mesh_data", ())) + 1
            except (AttributeError, KeyError, TypeError):
                left -= 1  # `_sharding` says what is wrong with it
        if left < 0:
            raise ValueError(f"its tensors have more than {_MOST_PARTS} parts")


def _tensor(item: str, path: Nested, groups: Any, n_ranks: int) -> StoredTensor:
    name = ".".join(map(str, path)) or item
    if type(groups) is not list or not groups:
        raise ValueError(f"{name} has no list of how it is cut")
    shardings = []
    for group in groups:
        try:
            shardings.append(_sharding(_dict(group, "how it is cut"), n_ranks))
        except _UnknownError as error:
            return StoredTensor(item, path, (), str(error))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len({(one.dtype, one.shape) for one in shardings}) > 1:
        told = " and ".join(f"{list(one.shape)} {one.dtype}" for one in shardings[:2])
        return StoredTensor(item, path, (), f"its ranks disagree on what it is: {told}")
    return StoredTensor(item, path, tuple(shardings))


class _UnknownError(Exception):
    """A tensor is described in a way that only a later version, or its trainer, can read."""


def _unknown(what: str) -> _UnknownError:
    return _UnknownError(
        f"it is {what}, which this version of llamaconv does not know; a torch_checkpointing later "
        f"than {NEWEST} or a trainer's own class may have written it"
    )


def _sharding(group: Mapping[Any, Any], n_ranks: int) -> Sharding:
    ranks = _sizes(group.get("ranks"), "its ranks", _MOST_RANKS)
    if not ranks or len(set(ranks)) != len(ranks) or max(ranks) >= n_ranks:
        raise ValueError(f"its ranks are not some of the {n_ranks} that saved it")
    packed = _dict(group.get("sharding_metadata"), "how it is cut")
    data = _dict(packed.get("data"), "how it is cut")
    kind = packed.get("type")
    if kind not in ("DTensorShardingMetadata", "default_tensor_v1"):
        raise _unknown(f"described by {kind!r}")
    shape = _sizes(data.get("global_shape"), "its shape")
    dtype = data.get("dtype")
    if type(dtype) is not str or not dtype.startswith("torch."):
        raise ValueError("invalid dtype")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise _unknown(f"of dtype {dtype}")
    if kind == "default_tensor_v1":
        return Sharding(dtype, shape, ranks, boxes=tuple(_listed_boxes(data, shape)))
    mesh = _dict(data.get("mesh_spec"), "its mesh")
    extents = _sizes(mesh.get("mesh_shape"), "the shape of its mesh")
    members = _sizes(mesh.get("mesh_data"), "its mesh", _MOST_RANKS)
    if prod(extents) != len(members) or len(set(members)) != len(members):
        raise ValueError(
            f"its mesh of shape {list(extents)} has {len(members)} ranks, or some twice"
        )
    if not set(ranks) <= set(members):
        raise ValueError("its ranks are not in its mesh")
    placements = data.get("placements")
    if type(placements) is not list or len(placements) != len(extents):
        raise ValueError("it does not have one placement for each dimension of its mesh")
    cuts = tuple(_cut(_dict(placement, "a placement"), len(shape)) for placement in placements)
    return Sharding(dtype, shape, ranks, extents, members, cuts)


def _cut(placement: Mapping[Any, Any], n_axes: int) -> tuple[int, int] | None:
    kind = placement.get("type")
    if kind == "Replicate":
        return None
    if kind not in ("Shard", "StridedShard"):
        raise _unknown(f"placed by {kind!r}")
    axis, factor = placement.get("dim"), placement.get("split_factor", 1)
    if not is_whole(axis) or axis >= n_axes or not is_whole(factor) or not factor:
        raise ValueError(f"it is cut along axis {axis!r} of {n_axes}")
    return axis, factor


def _listed_boxes(data: Mapping[Any, Any], shape: tuple[int, ...]) -> Iterator[Box]:
    """Yield the rectangles of a tensor that lists them itself."""
    lists = [data.get(key) for key in ("global_offsets", "local_offsets", "local_sizes")]
    if any(type(one) not in (list, tuple) for one in lists) or len({*map(len, lists)}) != 1:  # type: ignore[arg-type]
        raise ValueError("it does not list as many offsets as sizes")
    for rows in zip(*lists, strict=True):
        start, local, extent = (_sizes(one, "its offsets and sizes") for one in rows)
        if not len(start) == len(local) == len(extent) == len(shape):
            raise ValueError("its parts have other dimensions than its own")
        if prod(extent):
            yield Box(start, local, extent)


def _sizes(value: Any, what: str, most: int = 0) -> tuple[int, ...]:
    """Return whole numbers, which the package writes as a list or as a tuple."""
    if most and type(value) in (list, tuple) and len(value) <= most and all(map(is_whole, value)):
        return tuple(value)
    try:
        return sizes(value, list if type(value) is list else tuple)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
