"""One file of ``torch.save``, opened for its tensors' names, shapes and places only.

``torch.load(weights_only=True)`` reads the pickle, so nothing in it runs; under a fake-tensor
mode it makes no tensors, only says where in the file their bytes lie. Limit: the zip format of
torch 1.6 and later, and contiguous tensors.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamaconv.files import check_is_file, what_it_is
from llamaconv.pieces import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.problems import Problem


class WithoutData(FakeTensorMode):
    """While entered, tensors of the processor have shape and dtype and no data, in any thread.

    torch would prepare for tensors of a GPU that is not there. In a build with CUDA that leaves a
    pointer to the memory of the thread, and once that has ended the next one crashes (until
    https://github.com/pytorch/pytorch/pull/178950, which 2.10 lacks and 2.13 has).
    """

    @property
    def avoid_device_init(self) -> bool:
        return False


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors of one ``.pth`` or ``.bin`` file, and every problem found."""
    try:
        check_is_file(path)
        with open(path, "rb") as file:
            start = file.read(512)
        file_bytes = path.stat().st_size
    except OSError as error:
        return {}, [Problem(f"{path}: {error.strerror or error}")]
    if not start.startswith(b"PK\x03\x04"):
        reason = what_it_is(start) or (
            "not a file of torch.save since torch 1.6; load it with torch and save it again"
        )
        return {}, [Problem(f"{path}: {reason}", (path.name,))]
    try:
        with WithoutData():
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
            tensors[name] = _info(path, file_bytes, name, tensor)
        except ValueError as error:
            problems.append(Problem(f"{path}: tensor {name}: {error}", (name,)))
    return tensors, problems


def _info(path: Path, file_bytes: int, name: str, tensor: torch.Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is not known")
    if not tensor.is_contiguous():
        raise ValueError("its rows are not contiguous; save it again with .contiguous()")
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None
    offset = int(start + tensor.storage_offset() * DTYPE_BYTES[dtype])
    shape = tuple(tensor.shape)
    info = TensorInfo(name, dtype, shape, (Piece(path, offset, (0,) * len(shape), shape),))
    if offset + info.nbytes > file_bytes:
        raise ValueError(
            f"ends at byte {offset + info.nbytes}, the file has {file_bytes}; it was cut, "
            "download it again"
        )
    return info
