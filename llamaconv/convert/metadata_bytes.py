"""Write ``.metadata`` in the form that every supported torch and Python reads.

A pickle holds its classes' names and fields as the writing torch has them: torch 2.15 added a sixth
field to `TensorProperties`, and torch up to 2.14 takes exactly five. People convert on a laptop and
train on a cluster with another torch, so the form here is that of torch 2.10: the classes by the
names, and with the fields, that torch has had since then, in protocol 4 (Python's own choice from
3.8 to 3.13), without a path. The same tensors give the same bytes under every torch and Python.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.serialization import _get_layout

from llamaconv.checkpoint.untrusted.dcp_metadata import Metadata, TensorEntry

_PROTOCOL = 4


def encoded(metadata: Metadata) -> bytes:
    """Return the bytes of a ``.metadata``; no entry of ``metadata`` may be an `UnknownEntry`."""
    tensors = {sys.intern(name): _entry(entry) for name, entry in metadata.entries.items()}
    numbers = {
        (name, offsets): number
        for name, entry in metadata.entries.items()
        if isinstance(entry, TensorEntry)
        for number, (offsets, _) in enumerate(entry.chunks)
    }
    locations = {}
    for (name, offsets), place in metadata.locations.items():
        index = _Object(
            torch_metadata.MetadataIndex,
            {
                "fqn": sys.intern(name),
                "index": None if offsets is None else numbers[name, offsets],
                "offset": None if offsets is None else _size(offsets),
            },
        )
        locations[index] = _Object(
            _StorageInfo,
            {
                "relative_path": sys.intern(place.file),
                "offset": place.offset,
                "length": place.length,
            },
        )
    unnamed: dict[str, Any] = {
        "checkpoint_id": None,
        "save_id": None,
        "load_id": None,
        "modules": [],
    }
    whole = _Object(
        torch_metadata.Metadata,
        {
            "state_dict_metadata": tensors,
            "planner_data": None,
            "storage_data": locations,
            # Torch would record the folder's path and a random id; without them the same
            # conversion gives the same bytes, and the folder can be moved.
            "storage_meta": _Object(torch_metadata.StorageMeta, unnamed),
            "version": CURRENT_DCP_VERSION,
        },
    )
    stream = io.BytesIO()
    pickle.Pickler(stream, _PROTOCOL).dump(whole)
    return stream.getvalue()


class _Object:
    """Pickled as an object of class ``kind`` with the attributes ``state``, whatever it has now."""

    def __init__(self, kind: type, state: Any) -> None:
        self.kind = kind
        self.state = state

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (self.kind,), self.state  # type: ignore[attr-defined]

    # The pickler writes a state only for an object that says it is of the class.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.kind


class _Call:
    """Pickled as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.call


def _size(numbers: tuple[int, ...]) -> _Call:
    return _Call(torch.Size, numbers)


def _entry(entry: object) -> _Object:
    if entry is None:
        return _Object(torch_metadata.BytesStorageMetadata, None)
    assert isinstance(entry, TensorEntry)
    properties = (
        getattr(torch, entry.dtype),
        _Call(_get_layout, "torch.strided"),
        False,  # requires_grad
        # By its value, as Python does from 3.11.4; before, by getattr.
        _Call(torch_metadata._MEM_FORMAT_ENCODING, 0),
        False,  # pin_memory
    )
    chunks = [
        _Object(
            torch_metadata.ChunkStorageMetadata,
            {"offsets": _size(offsets), "sizes": _size(sizes)},
        )
        for offsets, sizes in entry.chunks
    ]
    return _Object(
        torch_metadata.TensorStorageMetadata,
        {
            "properties": _Object(torch_metadata.TensorProperties, properties),
            "size": _size(entry.shape),
            "chunks": chunks,
        },
    )
