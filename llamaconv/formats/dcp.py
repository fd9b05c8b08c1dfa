"""PyTorch Distributed Checkpoints, opened from their metadata; `dcp_write` writes them.

``.metadata`` is a pickle, so only the classes that a checkpoint needs are admitted. Where the
bytes of an entry begin is asked of torch; no tensor is loaded.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from llamaconv import keys, receipt
from llamaconv.foreign import what_names_are
from llamaconv.formats.dcp_metadata import check_metadata, check_pickle
from llamaconv.formats.torch_archive import records
from llamaconv.fused import is_fused
from llamaconv.pieces import DTYPE_BYTES, Checkpoint, Ignored, Piece, TensorInfo
from llamaconv.problems import Problem, RefusedError, some, warning
from llamaconv.titan import GENERATIONS

METADATA = ".metadata"

# What a reader passes by: optimizer and trainer state of a full training checkpoint.
_TRAINER_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state", "ft_dataloader")


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint that ``folder`` holds, from its metadata and the envelopes of its entries.

    Trainer state beside the model is passed by and listed. Raises `RefusedError` where the
    metadata cannot be trusted or read.
    """
    metadata = read_metadata(folder)
    problems: list[Problem] = []
    written = receipt.try_read(folder, problems) or _of_step_0(folder, problems)
    ignored: list[Ignored] = []
    tensors: dict[str, TensorInfo] = {}
    lost = _lost_in_files(folder, metadata.storage_data, problems)
    for name, entry in metadata.state_dict_metadata.items():
        if name.split(".")[0] in _TRAINER_STATE:
            ignored.append(Ignored(name, "state of the trainer, not of the model"))
        elif keys.is_computed(name):
            ignored.append(Ignored(name, "RoPE's angles: every model computes them anew"))
        elif name in lost:
            continue
        elif isinstance(entry, TensorStorageMetadata):
            try:
                tensors[name] = _tensor(folder, name, entry, metadata.storage_data)
            except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
                problems.append(Problem(f"{folder}: tensor {name}: {error}", (name,)))
        else:
            ignored.append(Ignored(name, "not a tensor"))
    names = tensors.keys() | (lost if not tensors else set())
    naming = _naming(names)
    if naming is None:
        problems.append(Problem(f"{folder}: {what_names_are(names)}"))
    # Without a receipt the rows are taken to be what the owner of the names trains.
    usual: keys.Layout = "half_split" if naming == "huggingface" else "interleaved"
    return Checkpoint(
        path=folder,
        format="dcp",
        tensors=tensors,
        naming=naming,
        rope=written.target["rope"] if written else usual,
        params=written.params if written else None,
        problems=tuple(problems),
        ignored=tuple(ignored),
        receipt=written.to_json() if written else None,
    )


def _lost_in_files(
    folder: Path, storage: dict[MetadataIndex, _StorageInfo], problems: list[Problem]
) -> set[str]:
    """Names of tensors whose files are gone or too short, a problem a file."""
    ends: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for index, place in storage.items():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
        names.setdefault(place.relative_path, set()).add(index.fqn)
    lost: set[str] = set()
    for file, expected in ends.items():
        path = folder / file
        # os.path says no to a name that no file can have, where a Path raises.
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found is not None and found >= expected:
            continue
        what = "is not there" if found is None else f"{expected} bytes expected, {found} found"
        problems.append(
            Problem(
                f"{path}: {what}; it holds parts of {len(names[file])} tensors "
                f"({some(sorted(names[file]), 3)}). The save or the download is incomplete",
                tuple(sorted(names[file])),
            )
        )
        lost |= names[file]
    return lost


def _of_step_0(folder: Path, problems: list[Problem]) -> receipt.Receipt | None:
    """The receipt of the step-0 that a later step of TorchTitan was trained from."""
    origin = folder.absolute().parent / "step-0"
    found = receipt.try_read(origin, problems) if folder.name.startswith("step-") else None
    if found:
        problems.append(
            warning(f"{folder}: no receipt; parameters and layout are those of {origin}'s")
        )
    return found


def _naming(tensors: Iterable[str]) -> str | None:
    """The naming that every name fits, fused ones aside, or None."""
    names = [name for name in tensors if not is_fused(name)]
    # transformers' own names are in what FSDP and accelerate save of its models.
    for naming in (*GENERATIONS, "huggingface"):
        if names and all(keys.identify(name, naming) for name in names):
            return naming
    return None


def _tensor(
    folder: Path,
    name: str,
    entry: TensorStorageMetadata,
    storage: dict[MetadataIndex, _StorageInfo],
) -> TensorInfo:
    dtype = str(entry.properties.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is not known")
    pieces = []
    for chunk in entry.chunks:
        place = storage[MetadataIndex(name, chunk.offsets)]
        path = folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"its file {place.relative_path!r} lies outside the checkpoint")
        with open(path, "rb") as file:
            offset = payload_offset(file, place, chunk.sizes, entry.properties.dtype)
        pieces.append(Piece(path, offset, tuple(chunk.offsets), tuple(chunk.sizes)))
    tensor = TensorInfo(name, dtype, tuple(entry.size), tuple(pieces))
    if wrong := tensor.not_covered():
        raise ValueError(f"{wrong}; the metadata is damaged")
    return tensor


def payload_offset(
    file: BinaryIO, place: _StorageInfo, shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Where the bytes of one entry begin in its file, as torch itself finds them.

    Raises ``ValueError`` where the entry holds another tensor than the metadata says.
    """
    view = cast(IO[bytes], _create_file_view(cast(io.IOBase, file), place.offset, place.length))
    try:
        # An entry holds one tensor, so its storage is the first.
        inside, length = records(file, place.offset, place.length)["data/0"]
        with torch.serialization.skip_data():
            tensor = torch.load(view, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(
            f"its entry in {place.relative_path} is damaged and cannot be read: {reason}"
        ) from error
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"its entry in {place.relative_path} is damaged: it holds {type(tensor).__name__}"
        )
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"its entry in {place.relative_path} holds {list(tensor.shape)} {tensor.dtype}, "
            f"the metadata says {list(shape)} {dtype}"
        )
    if tensor.untyped_storage().nbytes() != length:
        raise ValueError(
            f"its entry in {place.relative_path} says {tensor.untyped_storage().nbytes()} bytes and "
            f"has {length}; it is damaged"
        )
    return int(place.offset + inside + tensor.storage_offset() * dtype.itemsize)


# A pickle can name any function of any module; these are what torch's own writer needs.
_ADMITTED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in DTYPE_BYTES),
    *(
        ("torch.distributed.checkpoint.metadata", name)
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
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        raise RefusedError(
            f"{METADATA} asks for {module}.{name}, which no checkpoint needs; "
            "the file is damaged or hostile and was not opened"
        )


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's metadata, unpickled with only the classes that it needs.

    Raises `RefusedError` where there is none, where it asks for more, or where it is damaged.
    """
    path = folder / METADATA
    if not path.is_file():
        raise RefusedError(f"{path}: is not there; a PyTorch Distributed Checkpoint has one")
    try:
        content = path.read_bytes()
        check_pickle(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
        check_metadata(metadata)
    except RefusedError as error:
        raise RefusedError(
            [replace(p, message=f"{path}: {p.message}") for p in error.problems]
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise RefusedError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    assert isinstance(metadata, Metadata)
    return metadata
