"""Read rows with other people's readers, to compare what the engine wrote.

Files are read by safetensors or ``torch.load``, distributed checkpoints by ``dcp.load``. Of
torch_checkpointing, the parts are read by these two, and placed by ``torch.chunk``.

A repository of the Hub is fetched by our own code, which no other replaces; where a tensor is in
its file is read from the header here, apart from what opened it.

The concession: two cases use our own `PieceReader`, at the offsets that the headers name.
``dcp.load`` reads whole entries, so tensors above 2 MiB are read in windows instead. And
safetensors and ``torch.load`` map files, which some filesystems cannot do. The results say so.
"""

from __future__ import annotations

import json
import mmap
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from llamaconv.checkpoint.checkpoint import Checkpoint, Format
from llamaconv.checkpoint.dcp import open_dcp
from llamaconv.checkpoint.fetch_ahead import FetchAhead
from llamaconv.checkpoint.folder import LocalFolder
from llamaconv.checkpoint.reader import PieceReader
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_folder import StoreFolder
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.torch_rows import TensorBuffer, read_rows
from llamaconv.checkpoint.trainer_state import read_trainer_state
from llamaconv.checkpoint.untrusted.dcp_metadata import read_metadata
from llamaconv.checkpoint.untrusted.torch_checkpointing_metadata import Metadata as StoreMetadata
from llamaconv.checkpoint.untrusted.torch_checkpointing_metadata import Sharding, StoredTensor
from llamaconv.checkpoint.untrusted.torch_checkpointing_metadata import (
    read_metadata as read_store_metadata,
)
from llamaconv.model.names import OPTIMIZER
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import FailedError, LlamaconvError
from llamaconv.verify import inert_pickle
from llamaconv.verify.torch_metadata import unpickle_metadata

# Tensors up to this size are loaded by `dcp.load` whole, a batch at a time. It holds each several
# times over: at 16 MiB the checks of 70B took twice the memory of those of 8B.
WHOLE_BYTES = 2 << 20
_MOST_MAPPED_BYTES = 16 << 20
_LOADING = threading.Lock()


@contextmanager
def _failures_named(path: object, reader: str) -> Iterator[None]:
    """Turn what a reader raises into a `FailedError` that names the reader and the file.

    Other people's readers raise whatever their libraries do, and their messages name no file.
    `LlamaconvError` already names both, and the command line reports ``OSError``.
    """
    try:
        yield
    except (LlamaconvError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
        raise FailedError(f"{path}: cannot be read by {reader} ({reason})") from error


class IndependentReader:
    """Rows of a checkpoint's tensors, read by somebody else's code.

    Attributes:
        reader: Its name in messages.
        maps_files: Whether it maps the files that it reads.
        checkpoint: What it reads.
    """

    reader = "llamaconv's own reader"
    maps_files = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read ``checkpoint``, which must be a folder here."""
        self.checkpoint = checkpoint
        self.window = TensorBuffer()
        self._pieces = PieceReader()

    @property
    def concession(self) -> str:
        """What our own reader reads instead, for the results; empty if nothing."""
        return ""

    def prefetch(self, names: Sequence[str]) -> None:
        """Announce the tensors that `rows` is called for next; earlier ones may be dropped.

        Raises:
            FailedError: The reader failed.
        """
        with _failures_named(self.checkpoint.path, self.reader):
            self._prefetch(names)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows of a tensor in its stored dtype.

        Args:
            name: Name of the tensor.
            first: The first row.
            last: The row after the last.

        Returns:
            Shape ``(last - first, ...)``, valid until the next call, which reuses the memory.

        Raises:
            FailedError: The reader failed.
        """
        with _failures_named(self.checkpoint.path, self.reader):
            return self._rows(name, first, last)

    def needs_index(self, tensor: TensorInfo) -> bool:  # noqa: ARG002
        """Return whether a tensor can be read only once the whole checkpoint is there."""
        return False

    def close(self) -> None:
        """Close files that are still open; later calls of `rows` open them again."""
        self._pieces.close()

    def _prefetch(self, names: Sequence[str]) -> None:
        pass

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        raise NotImplementedError

    def _plain_rows(self, name: str, first: int, last: int) -> Tensor:
        # Kept open, so that the system reads ahead of the next window.
        return read_rows(self._pieces, self.checkpoint.tensors[name], first, last, self.window)


class SafetensorsReader(IndependentReader):
    """The safetensors library; tensors in several files are put together by row and column."""

    reader = "the safetensors library"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._file: Any = None
        self._path: Path | None = None
        self._mapped = 0

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        if len(tensor.pieces) == 1:
            return self._slice(tensor.pieces[0], name, first, last)
        # Saved by several ranks: each file has some of the rows, or of their columns.
        shape = (last - first, *tensor.shape[1:])
        rows = self.window.tensor(shape, getattr(torch, tensor.dtype))
        missing = rows.numel()
        for piece in tensor.pieces:
            begin, end = max(first, piece.start[0]), min(last, piece.start[0] + piece.shape[0])
            if begin >= end:
                continue
            part = self._slice(piece, name, begin - piece.start[0], end - piece.start[0])
            columns = tuple(
                slice(start, start + n)
                for start, n in zip(piece.start[1:], piece.shape[1:], strict=True)
            )
            rows[(slice(begin - first, end - first), *columns)] = part
            missing -= part.numel()
        if missing:  # or the rows of the previous window would pass for these
            raise FailedError(
                f"{name}: {missing} elements of rows {first} to {last} are in no file"
            )
        return rows

    def _slice(self, piece: Piece, name: str, first: int, last: int) -> Tensor:
        rows: Tensor = self._open(piece.local_file).get_slice(name)[first:last]
        self._mapped += rows.nbytes
        return rows

    def _open(self, path: Path) -> Any:
        # What was read of an open mapping counts as memory, and to open one takes as long as to
        # read a window: a tenth of the checks' time went there.
        if self._file is None or path != self._path or self._mapped > _MOST_MAPPED_BYTES:
            self._let_go()
            self._file, self._path = safe_open(path, framework="pt"), path
        return self._file

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file, self._mapped = None, 0

    def close(self) -> None:
        """Close the file that is open; later calls of `rows` open it again."""
        self._let_go()
        super().close()


class DcpLoadReader(IndependentReader):
    """``dcp.load`` for tensors up to `WHOLE_BYTES`; our own reader for larger ones."""

    reader = "torch.distributed.checkpoint"
    maps_files = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._loaded: dict[str, Tensor] = {}
        self._head = TensorBuffer()

    @property
    def concession(self) -> str:
        """Large tensors are read by our own reader."""
        if all(map(is_loaded_whole, self.checkpoint.tensors.values())):
            return ""
        return f"tensors of the DCP above {WHOLE_BYTES >> 20} MiB read by llamaconv's own reader"

    def needs_index(self, tensor: TensorInfo) -> bool:
        """Return whether ``dcp.load`` reads it, by the metadata."""
        return is_loaded_whole(tensor)

    @cached_property
    def _reader(self) -> FileSystemReader:
        return DcpReader(self.checkpoint.local_path)

    def _prefetch(self, names: Sequence[str]) -> None:
        tensors = [self.checkpoint.tensors[name] for name in dict.fromkeys(names)]
        small = list(filter(is_loaded_whole, tensors))
        whole = [tensor for tensor in small if not tensor.stored]
        # Without any, the metadata is not read: it may not be there yet.
        self._loaded = load_dcp(self._reader, whole) if whole else {}
        parts: dict[str, list[TensorInfo]] = {}
        for tensor in small:
            if tensor.stored:
                parts.setdefault(tensor.stored, []).append(tensor)
        for stored, wanted in parts.items():
            self._split_fused(stored, wanted)

    def _split_fused(self, stored: str, wanted: list[TensorInfo]) -> None:
        """Take a fused tensor apart by its axes, as TorchTitan does with the views that it uses."""
        params = self.checkpoint.params
        assert params is not None
        columns = wanted[0].shape[1:]
        is_w13 = _role(wanted[0]) in ("w1", "w3")
        rows = (2, params.ffn_dim) if is_w13 else (params.q_rows + 2 * params.kv_rows,)
        whole = replace(wanted[0], name=stored, shape=(*rows, *columns))
        fused = load_dcp(self._reader, [whole])[stored]
        if is_w13:
            parts = {"w1": fused[0], "w3": fused[1]}
        else:
            groups = fused.reshape(params.n_kv_heads, -1, params.head_dim, *columns)
            parts = {"wq": groups[:, :-2], "wk": groups[:, -2], "wv": groups[:, -1]}
        for tensor in wanted:
            self._loaded[tensor.name] = parts[_role(tensor)].reshape(tensor.shape)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        if name in self._loaded:
            loaded = self._loaded[name]
            return loaded[first:last] if loaded.shape else loaded.reshape(1)  # a scalar is one row
        part = self.checkpoint.tensors[name]
        if part.stored and _role(part) in ("wq", "wk", "wv"):
            return self._rows_of_heads(part, first, last)
        return self._plain_rows(name, first, last)

    def _rows_of_heads(self, part: TensorInfo, first: int, last: int) -> Tensor:
        """Return rows of wq, wk or wv out of a fused matrix, head by head from its definition."""
        params, fused = self.checkpoint.params, self._stored[part.stored]
        rows = self.window.tensor((last - first, *part.shape[1:]), getattr(torch, part.dtype))
        done = 0
        for begin, end in _rows_in_fused(part, params, first, last):
            out = rows[done : done + end - begin]
            out.copy_(read_rows(self._pieces, fused, begin, end, self._head))
            done += end - begin
        return rows

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        """The tensors as they are stored, with those that were taken apart."""
        path, names = self.checkpoint.local_path, self.checkpoint.tensors
        found = open_dcp(LocalFolder(path)).tensors
        if any(name.startswith(f"{OPTIMIZER}.") for name in names):
            found |= read_trainer_state(path).tensors
        return found


Region = Sequence[tuple[int, int]]
"""First element and the one after the last along each axis."""


class _Axis(NamedTuple):
    """The numbers of the elements along an axis, ascending; the first, and the one after the last."""

    numbers: Tensor
    first: int
    last: int


class RankFilesReader(IndependentReader):
    """``torch.load`` or safetensors for the file of a rank, and ``torch.chunk`` for its place.

    ``torch.chunk`` is what a DTensor's placements are defined by: cutting the numbers of the rows
    (and of the columns) as it cuts a tensor tells which of them a rank has.
    """

    reader = "torch.load and the safetensors library"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._files: dict[Path, Any] = {}
        self._kept: tuple[StoredTensor, list[tuple[int, list[_Axis]]]] | None = None

    @cached_property
    def _metadata(self) -> StoreMetadata:
        return read_store_metadata(self.checkpoint.local_path)

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        # The model's item is the one whose files the tensors are in.
        files = {str(file) for file in self.checkpoint.local_files}
        found: dict[str, StoredTensor] = {}
        for tensor in self._metadata.tensors:
            ranks = (rank for one in tensor.shardings for rank in one.ranks)
            its = {self._metadata.files[tensor.item, rank].file for rank in ranks}
            if any(str(self.checkpoint.local_path / file) in files for file in its):
                found.setdefault(tensor.name, tensor)
        return found

    def _prefetch(self, _names: Sequence[str]) -> None:
        # Mapped per batch: what was read of a mapping counts as memory until it is closed.
        self._files.clear()

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        columns = [(0, n) for n in tensor.shape[1:]]
        if not tensor.stored:
            return self._region(name, [(first, last), *columns] if tensor.shape else [])
        if _role(tensor) in ("w1", "w3"):
            index = 0 if _role(tensor) == "w1" else 1
            return self._region(tensor.stored, [(index, index + 1), (first, last), *columns])[0]
        parts = [
            self._region(tensor.stored, [run, *columns]).clone()
            for run in _rows_in_fused(tensor, self.checkpoint.params, first, last)
        ]
        return torch.cat(parts)

    def _region(self, name: str, region: Region) -> Tensor:
        """Return a rectangle of a stored tensor, put together from the parts of the ranks."""
        tensor = self._tensors[name]
        shape = [last - first for first, last in region]
        out = self.window.tensor(tuple(shape), getattr(torch, tensor.shardings[0].dtype))
        missing = out.numel()
        for rank, axes in self._parts_of(tensor):
            if not all(
                axis.first < last and first < axis.last
                for axis, (first, last) in zip(axes, region, strict=True)
            ):
                continue
            spans = [
                slice(
                    int(torch.searchsorted(axis.numbers, first)),
                    int(torch.searchsorted(axis.numbers, last)),
                )
                for axis, (first, last) in zip(axes, region, strict=True)
            ]
            places = [
                (axis.numbers[span] - first).view(
                    [-1 if of == at else 1 for of in range(len(axes))]
                )
                for at, (axis, span, (first, _)) in enumerate(zip(axes, spans, region, strict=True))
            ]
            part = self._part(tensor, rank)[tuple(spans)].detach()
            if places:
                out[tuple(places)] = part
            else:
                out.copy_(part)
            missing -= part.numel()
        if missing:  # or the rows of the previous window would pass for these
            raise FailedError(f"{name}: {missing} elements of {list(region)} are in no file")
        return out

    def _parts_of(self, tensor: StoredTensor) -> list[tuple[int, list[_Axis]]]:
        """Return the ranks with a part that no rank before has, and what they have along each axis.

        Kept for the tensor that is read now: it is asked for each of its windows.
        """
        if self._kept is None or self._kept[0] is not tensor:
            found: dict[tuple[tuple[int, int, int], ...], tuple[int, list[_Axis]]] = {}
            for rank, numbers in (one for sharding in tensor.shardings for one in _held(sharding)):
                if all(map(len, numbers)):
                    axes = [_Axis(one, int(one[0]), int(one[-1]) + 1) for one in numbers]
                    found.setdefault(
                        tuple((axis.first, axis.last, len(axis.numbers)) for axis in axes),
                        (rank, axes),
                    )
            self._kept = tensor, list(found.values())
        return self._kept[1]

    def _part(self, tensor: StoredTensor, rank: int) -> Any:
        """Return the part of a rank, or what can be sliced as it."""
        file = self._metadata.files[tensor.item, rank]
        path = self.checkpoint.local_path / file.file
        if file.kind == "safetensors":
            with safe_open(path, framework="pt") as opened:
                name = ".".join(map(str, tensor.path))
                sliced = opened.get_slice(name)
                return sliced if sliced.get_shape() else opened.get_tensor(name)
        if path not in self._files:
            self._files[path] = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=inert_pickle, mmap=True
            )
        part = self._files[path]
        for key in tensor.path:
            part = part[key]
        return part


def _held(sharding: Sharding) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each rank, and which elements it has along each axis of the tensor."""
    if sharding.boxes is not None:
        raise FailedError("parts that are listed one by one have no other reader")
    whole, wanted = [torch.arange(length) for length in sharding.shape], set(sharding.ranks)
    places = product(*map(range, sharding.mesh))
    for rank, index in zip(sharding.members, places, strict=True):
        if rank not in wanted:
            continue
        axes = list(whole)
        for extent, at, cut in zip(sharding.mesh, index, sharding.cuts, strict=True):
            if cut is not None:
                axis, factor = cut
                pieces = [_chunk(one, extent, at) for one in _chunks(axes[axis], factor)]
                axes[axis] = torch.cat(pieces)
        yield rank, axes


def _chunks(numbers: Tensor, n_chunks: int) -> list[Tensor]:
    """Return ``torch.chunk``, which gives fewer if the rest would be empty."""
    found = list(numbers.chunk(n_chunks))
    return found + [numbers[:0]] * (n_chunks - len(found))


def _chunk(numbers: Tensor, n_chunks: int, number: int) -> Tensor:
    return _chunks(numbers, n_chunks)[number]


def _rows_in_fused(
    part: TensorInfo, params: LlamaParams | None, first: int, last: int
) -> Iterator[tuple[int, int]]:
    """Yield where rows of wq, wk or wv are in a fused matrix, head by head from its definition."""
    assert params is not None
    size, group = params.head_dim, params.n_heads // params.n_kv_heads
    row = first
    while row < last:
        head, within = divmod(row, size)
        if _role(part) == "wq":
            kv_head, place = divmod(head, group)
        else:
            kv_head, place = head, group + (_role(part) == "wv")
        begin = (kv_head * (group + 2) + place) * size + within
        n_rows = min(size - within, last - row)
        yield begin, begin + n_rows
        row += n_rows


def _role(part: TensorInfo) -> str:
    """Return the role of a part: ``a.wqkv.weight[wq]`` in titan-main, ``a.wq.weight`` elsewhere."""
    return part.name.rpartition("[")[2].rstrip("]").removesuffix(".weight").rpartition(".")[2]


def is_loaded_whole(tensor: TensorInfo) -> bool:
    """Return whether `dcp.load` reads a tensor, and not our own reader."""
    # A part of a fused matrix is loaded with the two others.
    return (3 if tensor.stored else 1) * tensor.nbytes <= WHOLE_BYTES


class TorchLoadReader(IndependentReader):
    """``torch.load``, mapped, and ``torch.cat`` for a tensor in several files."""

    reader = "torch.load"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._files: dict[Path, Any] = {}

    def _prefetch(self, _names: Sequence[str]) -> None:
        # Mapped per batch: what was read of a mapping counts as memory until it is closed.
        self._files.clear()

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        parts: list[Tensor] = []
        for piece in tensor.pieces:
            top = piece.start[0]
            begin, end = max(first, top), min(last, top + piece.shape[0])
            if begin < end:
                whole = self._open(piece.local_file)
                for key in tensor.keys or (name,):
                    whole = whole[key]
                # A parameter would record what is computed with it; a view may be transposed.
                parts.append(whole.detach()[begin - top : end - top].contiguous())
        if len(parts) == 1:
            return parts[0]
        narrow = len(tensor.pieces) > 1 and tensor.pieces[1].start[0] == 0
        joined = self.window.tensor((last - first, *tensor.shape[1:]), parts[0].dtype)
        return torch.cat(parts, dim=1 if narrow else 0, out=joined)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError:  # there are other values than tensors
                loaded = torch.load(
                    path,
                    map_location="cpu",
                    weights_only=False,
                    pickle_module=inert_pickle,
                    mmap=True,
                )
            self._files[path] = loaded
        return self._files[path]


class PlainReader(IndependentReader):
    """Our own reader, for filesystems that cannot map files."""

    @property
    def concession(self) -> str:
        """Everything is read by our own reader."""
        return "read by llamaconv's own reader, because the filesystem cannot map files"

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        return self._plain_rows(name, first, last)


class RemoteReader(IndependentReader):
    """Rows of files that are not here, fetched by ranges.

    Those of safetensors are at the offsets that their headers state, read by Python's own JSON.
    """

    maps_files = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        is_hub = isinstance(checkpoint.path, RemoteFile) and checkpoint.path.commit is not None
        self.reader = "the Hub" if is_hub else "the store"
        self._ahead = FetchAhead()
        self._headers: dict[str, Any] = {}

    def _prefetch(self, names: Sequence[str]) -> None:
        for name in names:
            if (place := self._place(name)) is not None:
                self._ahead.expect(*place)
            else:
                tensor = self.checkpoint.tensors[name]
                self._pieces.expect_rows(tensor, 0, tensor.n_rows)
        self._ahead.start()
        self._pieces.start()

    @property
    def concession(self) -> str:
        """What is in other files than safetensors is located by our own reader."""
        if all(map(self._place, self.checkpoint.tensors)):
            return ""
        return "files that are not here read by llamaconv's own reader"

    def _place(self, name: str) -> tuple[RemoteFile, int, int] | None:
        """Return the file of a tensor, and its first and last byte; None if that is not so simple."""
        tensor = self.checkpoint.tensors[name]
        file = tensor.pieces[0].file
        assert isinstance(file, RemoteFile) and self.checkpoint.remote is not None
        if len(tensor.pieces) > 1 or tensor.stored or not file.name.endswith(".safetensors"):
            return None
        start = self.checkpoint.remote.start_of(file.name)
        if file.name not in self._headers:
            self._headers[file.name] = json.loads(start[8:])
        if name not in self._headers[file.name]:
            return None  # opened by another name, without a wrapper's
        begin, end = self._headers[file.name][name]["data_offsets"]
        return file, len(start) + begin, len(start) + end

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        if (place := self._place(name)) is None:
            return self._plain_rows(name, first, last)
        file, begin, end = place
        tensor = self.checkpoint.tensors[name]
        row_bytes = (end - begin) // tensor.n_rows
        rows = self.window.tensor((last - first, *tensor.shape[1:]), getattr(torch, tensor.dtype))
        at = begin + first * row_bytes
        self._ahead.read_into(file, at, self.window.take((last - first) * row_bytes))
        return rows


def _can_map(file: Path) -> bool:
    with file.open("rb") as opened:
        try:
            mmap.mmap(opened.fileno(), 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()
        except OSError:
            return False
    return True


def reader_for(checkpoint: Checkpoint) -> IndependentReader:
    """Return the reader for the format of ``checkpoint`` and the filesystem that it is on."""
    if checkpoint.format == "dcp" and isinstance(checkpoint.remote, StoreFolder):
        from llamaconv.verify.store_dcp import StoreDcpLoadReader

        return StoreDcpLoadReader(checkpoint, checkpoint.remote)
    if checkpoint.remote is not None:
        return RemoteReader(checkpoint)
    reader = READERS[checkpoint.format](checkpoint)
    if reader.maps_files and not all(map(_can_map, checkpoint.local_files)):
        return PlainReader(checkpoint)
    return reader


def _files_reader(checkpoint: Checkpoint) -> IndependentReader:
    if all(file.suffix == ".safetensors" for file in checkpoint.local_files):
        return SafetensorsReader(checkpoint)
    return TorchLoadReader(checkpoint)


def _rank_files_reader(checkpoint: Checkpoint) -> IndependentReader:
    metadata = read_store_metadata(checkpoint.local_path)
    if any(one.boxes is not None for tensor in metadata.tensors for one in tensor.shardings):
        return PlainReader(checkpoint)
    return RankFilesReader(checkpoint)


READERS: dict[Format, Callable[[Checkpoint], IndependentReader]] = {
    "huggingface": _files_reader,
    "meta": _files_reader,
    "dcp": DcpLoadReader,
    "torch_checkpointing": _rank_files_reader,
}
"""The reader of each format."""


class DcpReader(FileSystemReader):
    """Torch's reader of one checkpoint, with the metadata read once, after ours has checked it.

    Torch does whatever ``.metadata`` says, and reads only what the same torch and Python wrote (see
    `torch_metadata`). If it cannot read the file, ``dcp.load`` logs a traceback, looks for other
    files, and then reports those.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata of the checkpoint in ``folder``; raise `RefusedError` if invalid."""
        super().__init__(folder)
        read_metadata(folder)
        self._metadata = unpickle_metadata(folder)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the metadata that was read."""
        return self._metadata


def load_dcp(reader: FileSystemReader, tensors: Sequence[TensorInfo]) -> dict[str, Tensor]:
    """Load ``tensors`` of a checkpoint, whole, through ``dcp.load``.

    Returns:
        The tensors by name.

    Raises:
        FailedError: Torch failed.
        OSError: A file cannot be read.
    """
    state = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in tensors
    }
    if state:
        # Filters of warnings belong to the process, not to a thread.
        with _LOADING, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            try:
                dcp_load(state, storage_reader=reader, no_dist=True)
            except CheckpointException as wrapped:
                # A BaseException whose own message is only that some rank failed.
                cause = next((error for error, _ in wrapped.failures.values()), wrapped)
                if not isinstance(cause, Exception) or isinstance(cause, OSError):
                    raise cause from None
                reason = str(cause).split("\n", maxsplit=1)[0]
                raise FailedError(
                    f"{reader.path}: torch's own loader fails on it ({type(cause).__name__}: "
                    f"{reason}); its files are damaged"
                ) from wrapped
    return state
