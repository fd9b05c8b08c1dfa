"""Whether what came out of ``.metadata`` is what it should be: every value of the right type.

The unpickler admits only harmless classes, but a damaged file can put anything in their places,
and torch checks none of it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


def check_pickle(content: bytes) -> None:
    """Raises ``ValueError`` where reading the pickle would ask for memory out of all proportion.

    Its machine numbers what it remembers, and makes room for the highest number that is named.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(str(argument)) > len(content):
            raise ValueError(f"it remembers something as number {argument}; the file is damaged")


def check_metadata(metadata: object) -> None:
    """Raises ``ValueError`` that says what is not as torch writes it."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds no checkpoint metadata")
    entries, storage = _of(metadata, "state_dict_metadata"), _of(metadata, "storage_data")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError("its tensors are not listed by name")
    if not isinstance(storage, dict):
        raise ValueError("it does not say where the bytes lie")
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
    for index, place in storage.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError("the places of its bytes are of another kind")
        _check_place(index, place)


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    properties, size, chunks = (_of(entry, what) for what in ("properties", "size", "chunks"))
    if not isinstance(properties, TensorProperties) or not isinstance(
        _of(properties, "dtype"), torch.dtype
    ):
        raise ValueError(f"{name} has no dtype")
    if not _sizes(size) or not isinstance(chunks, list | tuple):
        raise ValueError(f"{name} has no shape")
    for chunk in chunks:
        fits = isinstance(chunk, ChunkStorageMetadata) and all(
            _sizes(lengths) and len(lengths) == len(size)
            for lengths in (_of(chunk, "offsets"), _of(chunk, "sizes"))
        )
        if not fits:
            raise ValueError(f"{name} has a chunk that is none of shape {list(size)}")


def _check_place(index: MetadataIndex, place: _StorageInfo) -> None:
    name, offset = _of(index, "fqn"), _of(index, "offset")
    if not isinstance(name, str) or not (offset is None or _sizes(offset)):
        raise ValueError("an entry is of no tensor")
    file, span = _of(place, "relative_path"), (_of(place, "offset"), _of(place, "length"))
    if not isinstance(file, str) or not _sizes(span):
        raise ValueError(f"{name} has no place in a file")
    if place.transform_descriptors:
        raise ValueError(f"{name} is stored transformed ({place.transform_descriptors!r})")


def _of(value: object, name: str) -> Any:
    """An attribute, None where the damage left it out."""
    return getattr(value, name, None)


def _sizes(values: Any) -> bool:
    """Whether these are lengths or offsets that a file could have."""
    return isinstance(values, Iterable) and all(type(n) is int and 0 <= n < 2**63 for n in values)
