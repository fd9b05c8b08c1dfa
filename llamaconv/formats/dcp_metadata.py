"""``.metadata`` of a distributed checkpoint, as values that were looked at one by one; without torch.

It is a pickle, and `dcp.load` does whatever it says. Here it is read as data (see `plain_pickle`),
only the classes that torch's writer needs may be named in it, and each value has to be of its type.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llamaconv.files import open_file
from llamaconv.formats.plain_pickle import Bytes, ForeignError, Made, Member, Named, read
from llamaconv.pieces import DTYPE_BYTES
from llamaconv.problems import RefusedError

NAME = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_MEMORY_FORMAT = f"{_METADATA}._MEM_FORMAT_ENCODING"
# A pickle can name any function of any module; these are what torch's own writer needs.
_ADMITTED = frozenset(
    {
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib.Path",
        "pathlib._local.PosixPath",
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
        "torch.distributed.checkpoint.filesystem._StorageInfo",
    }
)
# Their values are 0, 1 and 2.
_MEMORY_FORMATS = frozenset(
    f"{_MEMORY_FORMAT}.TORCH_{name}"
    for name in ("CONTIGUOUS_FORMAT", "CHANNELS_LAST", "PRESERVE_FORMAT")
)
# 405B with its optimizer, saved by 512 ranks, has some 300 MB.
_MOST_BYTES = 1 << 30
_MOST_DIMENSIONS = 8

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


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says: an `Entry` a name, None for what is no tensor, and their places.

    ``places`` are by name and offsets of the chunk, None for what is no tensor.
    """

    entries: dict[str, Entry | None]
    places: dict[tuple[str, Offsets | None], Place]


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the checkpoint in ``folder``.

    Raises `RefusedError` where there is none, where it names what no checkpoint needs, or where it
    is damaged.
    """
    path = folder / NAME
    try:
        with open_file(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if not 0 < n_bytes <= _MOST_BYTES:
                raise ValueError(f"it has {n_bytes} bytes")
            with _content(file) as content, _uncollected():
                return _metadata(read(content, _ADMITTED, _MEMORY_FORMATS))
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


def _metadata(value: Any) -> Metadata:
    state = _state(value, "Metadata")
    entries, places = state.get("state_dict_metadata"), state.get("storage_data")
    if type(entries) is not dict or type(places) is not dict:
        raise ValueError("it lists no tensors, or no files")
    if not all(type(name) is str for name in entries):
        raise ValueError("the name of a tensor is no text")
    return Metadata(
        {name: _entry(name, entry) for name, entry in entries.items()},
        {_index(index): _place(place) for index, place in places.items()},
    )


def _entry(name: str, value: Any) -> Entry | None:
    if _is_of(value, "BytesStorageMetadata"):
        return None
    state = _state(value, "TensorStorageMetadata")
    properties, chunks = state.get("properties"), state.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"{name} has no list of chunks")
    found = (_state(chunk, "ChunkStorageMetadata") for chunk in chunks)
    pairs = tuple((_sizes(one.get("offsets")), _sizes(one.get("sizes"))) for one in found)
    shape = _sizes(state.get("size"))
    if any(not len(shape) == len(offsets) == len(sizes) for offsets, sizes in pairs):
        raise ValueError(f"{name} has chunks of other dimensions than itself")
    return Entry(_dtype(name, properties), shape, pairs)


def _dtype(name: str, properties: Any) -> str:
    """Of the five that torch keeps of a tensor (its ``__getstate__``), the one that still counts."""
    state = properties.state if _is_of(properties, "TensorProperties") else None
    if type(state) is not tuple or len(state) != 5:
        raise ValueError(f"{name} has properties that are none")
    dtype, memory_format = state[0], state[3]
    if type(dtype) is not Named or dtype.name.removeprefix("torch.") not in DTYPE_BYTES:
        raise ValueError(f"{name} has a dtype that is none")
    made = type(memory_format) is Made and memory_format.name == _MEMORY_FORMAT
    if type(memory_format) is not Member and not (
        made and memory_format.args in ((0,), (1,), (2,))
    ):
        raise ValueError(f"{name} has a memory format that is none")
    return dtype.name.removeprefix("torch.")


def _index(value: Any) -> tuple[str, Offsets | None]:
    state = _state(value, "MetadataIndex")
    name, offset = state.get("fqn"), state.get("offset")
    if type(name) is not str:
        raise ValueError("the name of an entry is no text")
    return name, None if offset is None else _sizes(offset)


def _place(value: Any) -> Place:
    state = _state(value, "_StorageInfo")
    file, offset, length = (state.get(key) for key in ("relative_path", "offset", "length"))
    if type(file) is not str or file in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(file):
        raise ValueError(f"an entry's file {file!r} lies outside the checkpoint")
    if not (_is_whole(offset) and _is_whole(length)):
        raise ValueError(f"an entry of {file} begins or ends at no place of a file")
    if state.get("transform_descriptors"):
        raise ValueError(f"entries of {file} are compressed or encrypted; save them without")
    return Place(file, offset, length)


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
