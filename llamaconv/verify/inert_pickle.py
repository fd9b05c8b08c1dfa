"""Torch's files with a trainer's objects in them, for ``torch.load``: only tensors are built.

``torch.load`` with ``weights_only`` refuses a file in which options or counters are saved next to the
weights. This module is given to it as its ``pickle_module`` instead: what builds tensors is
torch's own, and every other name becomes an `Inert`, whatever it is. Nothing else is imported or
called. Of a DTensor, which a rank saves, the rank's own part is taken. `torch_archive` has read the same file as data before, and refused what no trainer saves.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

# What builds a plain tensor, by module.
_TORCHS = {
    "torch._utils": (
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    ),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("UntypedStorage",),
    "torch": ("Tensor", "Size", "device"),
    "collections": ("OrderedDict",),
}


class Inert:
    """In place of any value that is not a tensor: takes everything, does nothing."""

    def __new__(cls, *_args: Any, **_named: Any) -> Inert:
        """Return a value, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_named: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, _state: Any) -> None:
        """Take any state."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Take any item."""

    def append(self, _value: Any) -> None:
        """Take any value."""

    def extend(self, _values: Any) -> None:
        """Take any values."""


class Unpickler(pickle.Unpickler):
    """Builds tensors, dicts, lists and plain values; everything else is `Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return torch's own function or class, or what stands for another one."""
        if (module, name) == ("torch._utils", "_rebuild_wrapper_subclass"):
            return _part_of_rank
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuilt
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (is_dtype or name in _TORCHS.get(module, ())):
            return super().find_class(module, name)
        return _new_dict if (module, name) == ("collections", "defaultdict") else Inert


def _part_of_rank(*_args: Any) -> Any:
    """Stand for what makes a DTensor; `_rebuilt` takes the rank's part instead."""


def _rebuilt(builder: Any, kind: Any, args: Any, state: Any) -> Any:
    """Build a tensor with attributes as torch does, or take a DTensor's part of the rank."""
    if builder is _part_of_rank:
        attributes = state if isinstance(state, tuple) else (state,)
        return next(one["_local_tensor"] for one in attributes if one and "_local_tensor" in one)
    return torch._tensor._rebuild_from_type_v2(builder, kind, args, state)


def _new_dict(*_args: Any) -> dict[Any, Any]:
    return {}
