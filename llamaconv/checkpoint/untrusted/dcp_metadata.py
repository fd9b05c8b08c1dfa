"""``.metadata`` of a distributed checkpoint, with every value checked; without torch.

It is a pickle, and `dcp.load` does whatever it says. Here it is read as data (see `pickle_data`):
only the classes that torch's writer needs may be named in it, and each value must be of its type.

A later torch may add to what this one writes: fields of the same classes, dtypes, memory formats,
bookkeeping. Torch 2.15 added ``strides`` to `TensorProperties`, for example. Additions that cannot
change where a tensor's bytes are, or what they mean, are ignored. Additions that may are named.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.tensors import DTYPE_BYTES, Location
from llamaconv.checkpoint.untrusted.files import ByteSource, LocalBytes, open_bytes
from llamaconv.checkpoint.untrusted.pickle_data import (
    Bytes,
    EnumMember,
    ForbiddenNameError,
    PickledCall,
    PickledName,
    read,
)
from llamaconv.checkpoint.untrusted.values import is_bare_name, is_whole, sizes
from llamaconv.report.errors import RefusedError, first_few

NAME = ".metadata"
NEWEST_TORCH = "2.15"
"""The newest torch whose checkpoints were tested."""

PACKAGE = "torch.distributed.checkpoint"
_METADATA = f"{PACKAGE}.metadata"
_MEMORY_FORMAT = f"{_METADATA}._MEM_FORMAT_ENCODING"
# Where torch up to 2.2 has the class of a tensor's properties and that of their memory format.
OLD_PROPERTIES, OLD_MEMORY_FORMAT = (
    f"torch.distributed._shard.sharded_tensor.metadata.{name}"
    for name in ("TensorProperties", "MEM_FORMAT_ENCODING")
)
# A pickle can name any function of any module; torch's own writer needs these.
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
        OLD_PROPERTIES,
        OLD_MEMORY_FORMAT,
    }
)
# Their values are 0, 1 and 2. A later torch may have as many again (torch.channels_last_3d has no
# encoding yet); any other number is damage.
_MEMORY_FORMAT_VALUES = tuple((value,) for value in range(6))
_MEMORY_FORMATS = frozenset(
    f"{encoding}.TORCH_{name}"
    for encoding in (_MEMORY_FORMAT, OLD_MEMORY_FORMAT)
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
# Missing in checkpoints of torch before 2.4.
_VERSIONS = (None, "1.0.0")
# 405B with its optimizer, saved by 512 ranks, has some 300 MB.
_MOST_BYTES = 1 << 30
_MOST_ADDITIONS = 20

Offsets = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EntryLocation:
    """Where an entry is: the bare name of its file, its first byte, and its length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
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
        entries: A `TensorEntry` for each name, None for a value that is not a tensor.
        locations: Where each chunk is, by its tensor's name and its offsets, which are None for a
            value that is not a tensor.
        additions: What this version does not know and ignored although it may matter, one
            sentence per kind.
    """

    entries: dict[str, TensorEntry | UnknownEntry | None]
    locations: dict[tuple[str, Offsets | None], EntryLocation]
    additions: tuple[str, ...] = ()


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``; raises what `read_metadata_of` does."""
    return read_metadata_of(folder / NAME, open_bytes(folder / NAME))


def read_metadata_of(path: Location, opened: AbstractContextManager[ByteSource]) -> Metadata:
    """Read the metadata of a checkpoint.

    Args:
        path: The file, for messages.
        opened: What opens it; it may raise ``OSError``.

    Raises:
        RefusedError: There is none, it names what no checkpoint needs, or it is damaged.
    """
    try:
        with opened as source:
            if not 0 < source.n_bytes <= _MOST_BYTES:
                raise ValueError(f"it has {source.n_bytes} bytes")
            with _content(source) as content, _uncollected():
                return _Reader().metadata(read(content, ADMITTED, _MEMORY_FORMATS, _LATER))
    except FileNotFoundError as error:
        raise RefusedError(
            f"{path}: not found; a PyTorch Distributed Checkpoint has one"
        ) from error
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror or error}") from error
    except ForbiddenNameError as error:
        raise RefusedError(
            f"{path}: it asks for {error}, which no checkpoint needs. The file is damaged or "
            "hostile, and was not opened"
        ) from None
    except ValueError as error:
        raise RefusedError(f"{path}: not the metadata of a checkpoint: {error}") from error


@contextmanager
def _content(source: ByteSource) -> Iterator[Bytes]:
    """Give the bytes of a file: mapped, or read if it is not here or cannot be mapped."""
    try:
        if not isinstance(source, LocalBytes):
            raise OSError
        content = source.mapped()
    except OSError:
        yield source.read(0, source.n_bytes)
        return
    with content:
        yield content


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch off Python's garbage collector, which would scan all new objects repeatedly.

    That halves the time for many thousands of chunks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Reader:
    """Turns what the pickle holds into `Metadata`, and notes what is unknown."""

    def __init__(self) -> None:
        # What is unknown, the first value of it, and the names of the tensors that have it.
        self.unknown: dict[str, tuple[str, list[str]]] = {}

    def metadata(self, value: Any) -> Metadata:
        state = _state(value, "Metadata")
        entries, locations = state.get("state_dict_metadata"), state.get("storage_data")
        if type(entries) is not dict or type(locations) is not dict:
            raise ValueError("it lists no tensors, or no files")
        if not all(type(name) is str for name in entries):
            raise ValueError("the name of a tensor is not text")
        if (version := state.get("version")) not in _VERSIONS:
            self._note("Metadata.version", version, "the whole file")
        return Metadata(
            {name: self._entry(name, entry) for name, entry in entries.items()},
            dict(self._located(index, place) for index, place in locations.items()),
            tuple(
                f"{what} is {shown} (for {first_few(names, 3)}), which this version of llamaconv "
                f"does not know and did not use; a torch later than {NEWEST_TORCH} may have written it"
                for what, (shown, names) in self.unknown.items()
            ),
        )

    def _entry(self, name: str, value: Any) -> TensorEntry | UnknownEntry | None:
        if _is_of(value, "BytesStorageMetadata"):
            return None
        if type(value) is PickledCall and value.name not in ADMITTED:
            return UnknownEntry(_unknown(f"described by a {value.name}"))
        state = self._fields(value, "TensorStorageMetadata", name)
        chunks = state.get("chunks")
        if type(chunks) is not list:
            raise ValueError(f"{name} has no list of chunks")
        found = (self._fields(chunk, "ChunkStorageMetadata", name) for chunk in chunks)
        pairs = tuple((sizes(one.get("offsets")), sizes(one.get("sizes"))) for one in found)
        shape = sizes(state.get("size"))
        if any(not len(shape) == len(start) == len(extent) for start, extent in pairs):
            raise ValueError(f"{name} has chunks of other dimensions than its own")
        dtype = self._dtype(name, state.get("properties"), len(shape))
        if dtype not in DTYPE_BYTES:
            return UnknownEntry(_unknown(f"of dtype {dtype}"))
        return TensorEntry(dtype, shape, pairs)

    def _dtype(self, name: str, properties: Any, n_dimensions: int) -> str:
        """Return the dtype of tensor ``name``, the only property that matters.

        The strides are those of the tensor that was saved, which may have been a view. Torch 2.15
        is the first to write them, and reads them nowhere. The strides that locate bytes are in
        the entry itself (`torch_archive` refuses an entry that is not row-major).
        """
        state = properties.state if _is_of(properties, "TensorProperties") else None
        if type(state) is not tuple or len(state) < len(_PROPERTIES) - 1:
            raise ValueError(f"{name}: invalid properties")
        dtype, memory_format = state[0], state[3]
        # The dtypes are the only values of torch that the pickle may name and not call.
        if type(dtype) is not PickledName or not re.fullmatch(
            r"torch\.[a-z]\w*\d\w*|torch\.bool", dtype.name
        ):
            raise ValueError(f"{name}: invalid dtype")
        self._check_memory_format(name, memory_format)
        if len(state) >= len(_PROPERTIES) and state[5] is not None:
            try:
                strides = sizes(state[5])
            except ValueError:
                raise ValueError(f"{name}: invalid strides") from None
            if len(strides) != n_dimensions:
                raise ValueError(f"{name} has {len(strides)} strides and {n_dimensions} dimensions")
        for number, more in enumerate(state[len(_PROPERTIES) :], len(_PROPERTIES) + 1):
            if more:
                self._note(f"TensorProperties[{number}]", more, name)
        return dtype.name.removeprefix("torch.")

    def _check_memory_format(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` for an invalid memory format, which torch writes but never reads."""
        if type(value) is EnumMember:
            return
        known = (_MEMORY_FORMAT, OLD_MEMORY_FORMAT)
        if type(value) is not PickledCall or value.name not in known:
            raise ValueError(f"{name}: invalid memory format")
        if value.args not in _MEMORY_FORMAT_VALUES or value.state is not None:
            raise ValueError(f"{name}: invalid memory format")

    def _located(self, index: Any, place: Any) -> tuple[tuple[str, Offsets | None], EntryLocation]:
        where = self._fields(index, "MetadataIndex", "the list of files")
        name, offset = where.get("fqn"), where.get("offset")
        if type(name) is not str:
            raise ValueError("the name of an entry is not text")
        key = name, None if offset is None else sizes(offset)
        return key, self._place(place, name)

    def _place(self, value: Any, name: str) -> EntryLocation:
        state = self._fields(value, "_StorageInfo", name)
        file, offset, length = (state.get(key) for key in ("relative_path", "offset", "length"))
        if not is_bare_name(file):
            raise ValueError(f"the file {file!r} of an entry is outside the checkpoint")
        if not (is_whole(offset) and is_whole(length)):
            raise ValueError(f"invalid offset or length of an entry of {file}")
        if state.get("transform_descriptors"):
            raise ValueError(f"entries of {file} are compressed or encrypted; save them without")
        return EntryLocation(file, offset, length)

    def _fields(self, value: Any, kind: str, name: str) -> dict[Any, Any]:
        """Return the attributes of an object of the class ``kind``, and note unknown ones."""
        state = _state(value, kind)
        if not state.keys() <= _FIELDS[kind]:
            for field in state.keys() - _FIELDS[kind]:
                if state[field]:
                    self._note(f"{kind}.{field}", state[field], name)
        return state

    def _note(self, what: str, value: Any, name: str) -> None:
        if what not in self.unknown and len(self.unknown) == _MOST_ADDITIONS:
            raise ValueError(f"it has more than {_MOST_ADDITIONS} unknown fields")
        self.unknown.setdefault(what, (_shown(value), []))[1].append(name)


def _unknown(what: str) -> str:
    return (
        f"it is {what}, which this version of llamaconv does not know; a torch later than "
        f"{NEWEST_TORCH} may have written it"
    )


def _shown(value: Any) -> str:
    shown = value.name if isinstance(value, PickledCall | PickledName | EnumMember) else repr(value)
    return shown if len(shown) < 60 else f"{shown[:57]}..."


def _is_of(value: Any, kind: str) -> bool:
    return type(value) is PickledCall and value.name.rpartition(".")[2] == kind


def _state(value: Any, kind: str) -> dict[Any, Any]:
    """Return the attributes of an object of the class ``kind``. Raises ``ValueError``."""
    if not _is_of(value, kind) or value.args or type(value.state) is not dict:
        raise ValueError(f"expected a {kind}, found something else")
    state: dict[Any, Any] = value.state
    return state
