"""``.metadata`` of a distributed checkpoint, as values that were looked at one by one; without torch.

It is a pickle, and `dcp.load` does whatever it says. Here it is read as data (see `plain_pickle`),
only the classes that torch's writer needs may be named in it, and each value must be of its type.

A later torch may add to what this one writes: fields of the same classes, dtypes, memory formats,
bookkeeping. Torch 2.15 added ``strides`` to `TensorProperties`, for example. Additions that cannot
change where a tensor's bytes are, or what they mean, are read past. Additions that may are named.
"""

from __future__ import annotations

import gc
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llamaconv.files import open_file
from llamaconv.formats.plain_pickle import Bytes, ForeignError, Made, Member, Named, read
from llamaconv.pieces import DTYPE_BYTES
from llamaconv.problems import RefusedError, some

NAME = ".metadata"
NEWEST_TORCH = "2.15"
"""The newest torch whose checkpoints were tried."""

PACKAGE = "torch.distributed.checkpoint"
_METADATA = f"{PACKAGE}.metadata"
_MEMORY_FORMAT = f"{_METADATA}._MEM_FORMAT_ENCODING"
# A pickle can name any function of any module; these are what torch's own writer needs.
ADMITTED = frozenset(
    {
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib.Path",
        "pathlib._local.PosixPath",  # Python 3.13
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        *(f"torch.{dtype}" for dtype in DTYPE_BYTES),
        *(
            f"{_METADATA}.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{PACKAGE}.filesystem._StorageInfo",
    }
)
# Their values are 0, 1 and 2. A later torch may have as many more (it has no encoding yet for
# torch.channels_last_3d); any other number is damage.
_MEMORY_FORMAT_VALUES = tuple((value,) for value in range(6))
_MEMORY_FORMATS = frozenset(
    f"{_MEMORY_FORMAT}.TORCH_{name}"
    for name in ("CONTIGUOUS_FORMAT", "CHANNELS_LAST", "PRESERVE_FORMAT")
)
# What a later torch or Python may name: classes of the same modules, dtypes, memory formats, and
# paths (Python 3.13 moved them). Nothing of it is looked up or called.
_LATER = re.compile(
    rf"{re.escape(PACKAGE)}\.(metadata|filesystem)\._?[A-Z]\w*"
    rf"|{re.escape(_MEMORY_FORMAT)}\.TORCH_[A-Z0-9_]+"
    r"|torch\.(b?float|u?int|complex|bits)\d\w*"
    r"|pathlib(\._\w+)?\.(Pure)?(Posix|Windows)?Path",
    re.ASCII,
)
# The fields that torch 2.15 writes; those of TensorProperties have no names.
_FIELDS = {
    "ChunkStorageMetadata": {"offsets", "sizes"},
    "MetadataIndex": {"fqn", "offset", "index"},
    "TensorStorageMetadata": {"properties", "size", "chunks"},
    "_StorageInfo": {"relative_path", "offset", "length", "transform_descriptors"},
}
_PROPERTIES = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory", "strides")
# Absent in checkpoints of torch before 2.4.
_VERSIONS = (None, "1.0.0")
# 405B with its optimizer, saved by 512 ranks, has some 300 MB.
_MOST_BYTES = 1 << 30
_MOST_DIMENSIONS = 8
_MOST_ADDITIONS = 20

Offsets = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry lies: the bare name of its file, its first byte, and its length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: torch's name of its dtype, its shape, and offsets and sizes of each chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Offsets, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class UnknownEntry:
    """A tensor that only a later torch can read; ``reason`` says what is unknown."""

    reason: str


@dataclass(frozen=True)
class Metadata:
    """The contents of `.metadata`.

    Attributes:
        entries: An `Entry` for each name, None for a value that is not a tensor.
        places: Where each chunk is, by its tensor's name and its offsets, which are None for a
            value that is not a tensor.
        additions: What this version does not know and read past although it may matter, a
            sentence for each kind.
    """

    entries: dict[str, Entry | UnknownEntry | None]
    places: dict[tuple[str, Offsets | None], Place]
    additions: tuple[str, ...] = ()


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``.

    Raises:
        RefusedError: There is none, it names what no checkpoint needs, or it is damaged.
    """
    path = folder / NAME
    try:
        with open_file(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if not 0 < n_bytes <= _MOST_BYTES:
                raise ValueError(f"it has {n_bytes} bytes")
            with _content(file) as content, _uncollected():
                return _Reader().metadata(read(content, ADMITTED, _MEMORY_FORMATS, _LATER))
    except FileNotFoundError as error:
        raise RefusedError(
            f"{path}: is not there; a PyTorch Distributed Checkpoint has one"
        ) from error
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror or error}") from error
    except ForeignError as error:
        raise RefusedError(
            f"{path}: {NAME} asks for {error}, which no checkpoint needs; the file is damaged or "
            "hostile and was not opened"
        ) from None
    except ValueError as error:
        raise RefusedError(f"{path}: holds no checkpoint metadata: {error}") from error


@contextmanager
def _content(file: BinaryIO) -> Iterator[Bytes]:
    """The bytes of ``file``: mapped, or read where the filesystem cannot map files."""
    try:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        yield file.read()
        return
    with content:
        yield content


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would look through all that is made here again and again.

    It halves the time where there are many thousands of chunks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Reader:
    """Makes `Metadata` of what the pickle holds, and notes what is unknown on the way."""

    def __init__(self) -> None:
        # What is unknown, the first value of it, and the names of the tensors that have it.
        self.unknown: dict[str, tuple[str, list[str]]] = {}

    def metadata(self, value: Any) -> Metadata:
        state = _state(value, "Metadata")
        entries, places = state.get("state_dict_metadata"), state.get("storage_data")
        if type(entries) is not dict or type(places) is not dict:
            raise ValueError("it lists no tensors, or no files")
        if not all(type(name) is str for name in entries):
            raise ValueError("the name of a tensor is no text")
        if (version := state.get("version")) not in _VERSIONS:
            self._note("Metadata.version", version, "the whole file")
        return Metadata(
            {name: self._entry(name, entry) for name, entry in entries.items()},
            dict(self._located(index, place) for index, place in places.items()),
            tuple(
                f"{what} is {shown} (for {some(names, 3)}), which this version of llamaconv does "
                f"not know and did not use; a torch later than {NEWEST_TORCH} may have written it"
                for what, (shown, names) in self.unknown.items()
            ),
        )

    def _entry(self, name: str, value: Any) -> Entry | UnknownEntry | None:
        if _is_of(value, "BytesStorageMetadata"):
            return None
        if type(value) is Made and value.name not in ADMITTED:
            return UnknownEntry(_unknown(f"described by a {value.name}"))
        state = self._fields(value, "TensorStorageMetadata", name)
        chunks = state.get("chunks")
        if type(chunks) is not list:
            raise ValueError(f"{name} has no list of chunks")
        found = (self._fields(chunk, "ChunkStorageMetadata", name) for chunk in chunks)
        pairs = tuple((_sizes(one.get("offsets")), _sizes(one.get("sizes"))) for one in found)
        shape = _sizes(state.get("size"))
        if any(not len(shape) == len(offsets) == len(sizes) for offsets, sizes in pairs):
            raise ValueError(f"{name} has chunks of other dimensions than itself")
        dtype = self._dtype(name, state.get("properties"), len(shape))
        if dtype not in DTYPE_BYTES:
            return UnknownEntry(_unknown(f"of dtype {dtype}"))
        return Entry(dtype, shape, pairs)

    def _dtype(self, name: str, properties: Any, n_dimensions: int) -> str:
        """Return the dtype of tensor ``name``, the one property that still counts.

        The strides are those of the tensor that was saved, which may have been a view. Torch 2.15
        is the first to keep them, and reads them nowhere: those that locate bytes are in the
        entry itself (`torch_archive`, which refuses what is not row-major).
        """
        state = properties.state if _is_of(properties, "TensorProperties") else None
        if type(state) is not tuple or len(state) < len(_PROPERTIES) - 1:
            raise ValueError(f"{name} has properties that are none")
        dtype, memory_format = state[0], state[3]
        # The dtypes are the only values of torch that the pickle may name and not call.
        if type(dtype) is not Named or not re.fullmatch(
            r"torch\.[a-z]\w*\d\w*|torch\.bool", dtype.name
        ):
            raise ValueError(f"{name} has a dtype that is none")
        self._check_memory_format(name, memory_format)
        if len(state) >= len(_PROPERTIES) and state[5] is not None:
            try:
                strides = _sizes(state[5])
            except ValueError:
                raise ValueError(f"{name} has strides that are none") from None
            if len(strides) != n_dimensions:
                raise ValueError(f"{name} has {len(strides)} strides and {n_dimensions} dimensions")
        for number, more in enumerate(state[len(_PROPERTIES) :], len(_PROPERTIES) + 1):
            if more:
                self._note(f"TensorProperties[{number}]", more, name)
        return dtype.name.removeprefix("torch.")

    def _check_memory_format(self, name: str, value: Any) -> None:
        """It is written and never read. Raises ``ValueError`` where it is something else."""
        if type(value) is Member:
            return
        if type(value) is not Made or value.name != _MEMORY_FORMAT:
            raise ValueError(f"{name} has a memory format that is none")
        if value.args not in _MEMORY_FORMAT_VALUES or value.state is not None:
            raise ValueError(f"{name} has a memory format that is none")

    def _located(self, index: Any, place: Any) -> tuple[tuple[str, Offsets | None], Place]:
        where = self._fields(index, "MetadataIndex", "the list of files")
        name, offset = where.get("fqn"), where.get("offset")
        if type(name) is not str:
            raise ValueError("the name of an entry is no text")
        key = name, None if offset is None else _sizes(offset)
        return key, self._place(place, name)

    def _place(self, value: Any, name: str) -> Place:
        state = self._fields(value, "_StorageInfo", name)
        file, offset, length = (state.get(key) for key in ("relative_path", "offset", "length"))
        if (
            type(file) is not str
            or file in ("", ".", "..")
            or not {"/", "\\", "\0"}.isdisjoint(file)
        ):
            raise ValueError(f"an entry's file {file!r} lies outside the checkpoint")
        if not (_is_whole(offset) and _is_whole(length)):
            raise ValueError(f"an entry of {file} begins or ends at no place of a file")
        if state.get("transform_descriptors"):
            raise ValueError(f"entries of {file} are compressed or encrypted; save them without")
        return Place(file, offset, length)

    def _fields(self, value: Any, kind: str, name: str) -> dict[Any, Any]:
        """The attributes of an object of the class ``kind``; notes those that are unknown."""
        state = _state(value, kind)
        if not state.keys() <= _FIELDS[kind]:
            for field in state.keys() - _FIELDS[kind]:
                if state[field]:
                    self._note(f"{kind}.{field}", state[field], name)
        return state

    def _note(self, what: str, value: Any, name: str) -> None:
        if what not in self.unknown and len(self.unknown) == _MOST_ADDITIONS:
            raise ValueError(f"it has fields of more than {_MOST_ADDITIONS} unknown names")
        self.unknown.setdefault(what, (_shown(value), []))[1].append(name)


def _unknown(what: str) -> str:
    return (
        f"it is {what}, which this version of llamaconv does not know; a torch later than "
        f"{NEWEST_TORCH} may have written it"
    )


def _shown(value: Any) -> str:
    shown = value.name if isinstance(value, Made | Named | Member) else repr(value)
    return shown if len(shown) < 60 else f"{shown[:57]}..."


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is Made and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple or len(value) > _MOST_DIMENSIONS:
        raise ValueError("a shape or an offset is none")
    if not all(map(_is_whole, value)):
        raise ValueError("a shape or an offset is none: whole numbers of 0 and more were expected")
    return value


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**62


def _is_of(value: Any, kind: str) -> bool:
    return type(value) is Made and value.name.rpartition(".")[2] == kind


def _state(value: Any, kind: str) -> dict[Any, Any]:
    """The attributes of an object of the class ``kind``. Raises ``ValueError`` where it is none."""
    if not _is_of(value, kind) or value.args or type(value.state) is not dict:
        raise ValueError(f"a {kind} was expected where something else stands")
    state: dict[Any, Any] = value.state
    return state
