"""One file of ``torch.save``, opened for its tensors' names, shapes and places only.

``torch.load(weights_only=True)`` reads the pickle, so nothing in it runs; under a fake-tensor
mode it makes no tensors, only says where in the file their bytes lie. Limit: the zip format of
torch 1.6 and later, and contiguous tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaconv.files import what_it_is
from llamaconv.formats.torch_archive import records
from llamaconv.pieces import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.problems import Problem


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors of one ``.pth`` or ``.bin`` file, and every problem found."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        return {}, [Problem(f"{path}: {error.strerror or error}")]
    if not start.startswith(b"PK\x03\x04"):
        reason = what_it_is(start) or (
            "not a file of torch.save since torch 1.6; load it with torch and save it again"
        )
        return {}, [Problem(f"{path}: {reason}", (path.name,))]
    try:
        # Before torch, which crashes on some archives that no torch writes.
        with open(path, "rb") as file:
            spans = set(records(file).values())
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        return {}, [
            Problem(f"{path}: not only weights, and was not opened further: {reason}", (path.name,))
        ]
    except Exception as error:  # a damaged archive raises whatever its bytes happen to mean
        reason = str(error).split("\n", maxsplit=1)[0]
        return {}, [Problem(f"{path}: cut or damaged ({reason}); download it again", (path.name,))]
    if not isinstance(state, dict):
        return {}, [
            Problem(f"{path}: holds {type(state).__name__}, a dict of tensors was expected")
        ]
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            problems.append(
                Problem(f"{path}: {name} is a {type(tensor).__name__}, a tensor was expected")
            )
            continue
        try:
            tensors[name] = _info(path, spans, name, tensor)
        except ValueError as error:
            problems.append(Problem(f"{path}: tensor {name}: {error}", (name,)))
    return tensors, problems


def _info(
    path: Path, spans: Collection[tuple[int, int]], name: str, tensor: torch.Tensor
) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is not known")
    if not tensor.is_contiguous():
        raise ValueError("its rows are not contiguous; save it again with .contiguous()")
    storage = tensor.untyped_storage()
    start = storage._checkpoint_offset
    assert start is not None
    if (start, storage.nbytes()) not in spans:
        raise ValueError(
            f"its {storage.nbytes()} bytes at {start} are no record of the file; it is damaged, or "
            "was packed by another tool than torch. Download it again, or save it again with torch"
        )
    offset = int(start + tensor.storage_offset() * DTYPE_BYTES[dtype])
    shape = tuple(tensor.shape)
    return TensorInfo(name, dtype, shape, (Piece(path, offset, (0,) * len(shape), shape),))
