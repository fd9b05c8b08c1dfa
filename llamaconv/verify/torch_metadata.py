"""Torch's own reader of ``.metadata``, given what a checkpoint of another torch or Python needs.

The checks read a DCP with `dcp.load`, which unpickles ``.metadata`` into torch's classes. Torch up
to 2.14 takes five properties of a tensor and torch 2.15 writes six; torch up to 2.2 has their class
in another module; Python 3.13 writes a path that an older Python cannot import. So the unpickler
here looks names up in a short list: torch's own classes, with the differences bridged, and an inert
object for every other name. Nothing that a checkpoint names is imported or called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.serialization import _get_layout

from llamaconv.checkpoint.untrusted.dcp_metadata import (
    ADMITTED,
    NAME,
    OLD_MEMORY_FORMAT,
    OLD_PROPERTIES,
)


def unpickle_metadata(folder: Path) -> Metadata:
    """Return the metadata of the checkpoint in ``folder`` as torch's own classes hold it.

    Call `llamaconv.checkpoint.untrusted.dcp_metadata.read_metadata` first, which refuses a bad file.

    Raises:
        Exception: Any that unpickling can raise.
    """
    with (folder / NAME).open("rb") as file:
        return unpickle_content(file)


def unpickle_content(file: IO[bytes]) -> Metadata:
    """Return the metadata in an open file; see `unpickle_metadata`."""
    found = _Unpickler(file).load()
    if not isinstance(found, Metadata):
        raise TypeError(f"{NAME} holds a {type(found).__name__}, not torch's Metadata")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _INSTEAD:
            return _INSTEAD[full]
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if full in ADMITTED:
            home = metadata if module == metadata.__name__ else filesystem
            return getattr(home, name)
        return _Unknown


class _Unknown:
    """Stand in for what this torch does not have: accept any arguments and state, do nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Properties(TensorProperties):
    """Torch's, from the state of any torch: fields that this torch does not know are left out."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(tuple(state)[:_N_PROPERTIES])


_N_PROPERTIES = len(TensorProperties().__getstate__())
_MEMORY_FORMATS = metadata._MEM_FORMAT_ENCODING


def _memory_format(value: Any) -> Any:
    """Return the memory format of that number, contiguous if unknown: torch never reads it."""
    known = [member for member in _MEMORY_FORMATS if member.value == value]
    return known[0] if known else _MEMORY_FORMATS.TORCH_CONTIGUOUS_FORMAT


def _member(_enumeration: Any, name: str) -> Any:
    """Return a member of the only enumeration, as Python 3.11.0 to 3.11.3 pickles it."""
    return _MEMORY_FORMATS.__members__.get(name, _MEMORY_FORMATS.TORCH_CONTIGUOUS_FORMAT)


_INSTEAD: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.serialization._get_layout": _get_layout,
    f"{metadata.__name__}.TensorProperties": _Properties,
    OLD_PROPERTIES: _Properties,
    f"{metadata.__name__}._MEM_FORMAT_ENCODING": _memory_format,
    OLD_MEMORY_FORMAT: _memory_format,
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,
}
