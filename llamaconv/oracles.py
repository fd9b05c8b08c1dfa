"""Reading rows with other people's readers, to check what the engine wrote against.

safetensors and ``torch.load`` read files, `dcp.load` reads distributed checkpoints. It always reads
whole entries, so tensors of more than some MiB are read in windows, at the place in their file
that the directory of their entry names. Where a filesystem cannot map files, as safetensors and ``torch.load``
want it, rows are read plainly, at the places that the headers name.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from llamaconv.formats.dcp_metadata import read_metadata
from llamaconv.opened import Checkpoint
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import Piece, TensorInfo
from llamaconv.problems import FailedError, LlamaconvError
from llamaconv.torch_metadata import unpickle_metadata
from llamaconv.torch_rows import Window, read_rows

# Tensors up to this size are loaded by `dcp.load` whole, a batch at a time. It holds each several
# times over: at 16 MiB the checks of 70B took twice the memory of those of 8B.
WHOLE_BYTES = 2 << 20


@contextmanager
def _failures_named(path: object, reader: str) -> Iterator[None]:
    """Let what a reader raises leave as a `FailedError` that says which reader failed on what.

    Readers of other people raise whatever their libraries do, and their texts name no file.
    `LlamaconvError` already names both; ``OSError`` is the machine's, which the command line says.
    """
    try:
        yield
    except (LlamaconvError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
        raise FailedError(f"{path}: cannot be read by {reader} ({reason})") from error


class Oracle:
    """Rows of a checkpoint's tensors, by a reader that is not ours.

    ``reader`` names it. ``concession`` says, for the report, where it is ours after all. What it
    raises, of whatever class, becomes a `FailedError` that names checkpoint, reader and reason.
    """

    reader = "llamaconv's own reader"
    concession = ""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.window = Window()

    def prefetch(self, names: Sequence[str]) -> None:
        """Say which tensors are asked for next; those before may be forgotten.

        Raises:
            FailedError: The reader failed.
        """
        with _failures_named(self.checkpoint.path, self.reader):
            self._prefetch(names)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows ``first`` to ``last``, the last one excluded, as they are stored.

        They are valid until this oracle is asked for others: its window is used again.

        Raises:
            FailedError: The reader failed.
        """
        with _failures_named(self.checkpoint.path, self.reader):
            return self._rows(name, first, last)

    def _prefetch(self, names: Sequence[str]) -> None:
        pass

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        raise AssertionError

    def _plain_rows(self, name: str, first: int, last: int) -> Tensor:
        with PieceReader() as reader:
            return read_rows(reader, self.checkpoint.tensors[name], first, last, self.window)


class SafetensorsOracle(Oracle):
    reader = "the safetensors library"

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        if len(tensor.pieces) == 1:
            return self._slice(tensor.pieces[0], name, first, last)
        # Saved by several ranks: each file has a part, a slice of columns where it is narrower.
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
        if missing:  # else the window before this one would be taken for these rows
            raise FailedError(
                f"{name}: {missing} elements of rows {first} to {last} are in no file"
            )
        return rows

    def _slice(self, piece: Piece, name: str, first: int, last: int) -> Tensor:
        # Opened anew each time: a mapping kept open would count all that was read as memory.
        with safe_open(piece.local_file, framework="pt") as file:
            rows: Tensor = file.get_slice(name)[first:last]
        return rows


class DcpOracle(Oracle):
    reader = "torch.distributed.checkpoint"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._loaded: dict[str, Tensor] = {}

    @cached_property
    def _reader(self) -> DcpReader:
        return DcpReader(self.checkpoint.local_path)

    def _prefetch(self, names: Sequence[str]) -> None:
        tensors = [self.checkpoint.tensors[name] for name in dict.fromkeys(names)]
        small = [t for t in tensors if t.nbytes <= WHOLE_BYTES and not t.stored]
        self._loaded = load_dcp(self._reader, small)
        parts: dict[str, list[TensorInfo]] = {}
        for tensor in tensors:
            if tensor.stored and 3 * tensor.nbytes <= WHOLE_BYTES:
                parts.setdefault(tensor.stored, []).append(tensor)
        for stored, wanted in parts.items():
            self._take_apart(stored, wanted)

    def _take_apart(self, stored: str, wanted: list[TensorInfo]) -> None:
        """wq, wk, wv of a fused matrix, as TorchTitan's own hook splits it when it saves."""
        params = self.checkpoint.params
        assert params is not None
        columns = wanted[0].shape[1:]
        shape = (params.q_rows + 2 * params.kv_rows, *columns)
        whole = replace(wanted[0], name=stored, shape=shape)
        fused = load_dcp(self._reader, [whole])[stored]
        groups = fused.reshape(params.n_kv_heads, -1, params.head_dim, *columns)
        parts = {"wq": groups[:, :-2], "wk": groups[:, -2], "wv": groups[:, -1]}
        for tensor in wanted:
            part = parts[tensor.name.split(".")[-2]]
            self._loaded[tensor.name] = part.reshape(tensor.shape)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        if name in self._loaded:
            return self._loaded[name][first:last]
        return self._plain_rows(name, first, last)


class TorchFileOracle(Oracle):
    """``torch.load``, mapped, and ``torch.cat`` where a tensor lies in several files."""

    reader = "torch.load"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._files: dict[Path, dict[str, Tensor]] = {}

    def _prefetch(self, names: Sequence[str]) -> None:
        # Mapped anew a batch: what was read of a mapping counts as memory until it is closed.
        self._files.clear()

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        tensor = self.checkpoint.tensors[name]
        parts = []
        for piece in tensor.pieces:
            top = piece.start[0]
            begin, end = max(first, top), min(last, top + piece.shape[0])
            if begin < end:
                parts.append(self._open(piece.local_file)[name][begin - top : end - top])
        if len(parts) == 1:
            return parts[0]
        narrow = len(tensor.pieces) > 1 and tensor.pieces[1].start[0] == 0
        whole = self.window.tensor((last - first, *tensor.shape[1:]), parts[0].dtype)
        return torch.cat(parts, dim=1 if narrow else 0, out=whole)

    def _open(self, path: Path) -> dict[str, Tensor]:
        if path not in self._files:
            self._files[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return self._files[path]


class PlainOracle(Oracle):
    """Plain reads, where a filesystem cannot map files, as other readers do."""

    concession = "read by the engine's own plain reads, since the filesystem cannot map files"

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        return self._plain_rows(name, first, last)


def _can_map(file: Path) -> bool:
    with open(file, "rb") as opened:
        try:
            mmap.mmap(opened.fileno(), 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()
        except OSError:
            return False
    return True


def oracle(checkpoint: Checkpoint) -> Oracle:
    """The reader for a checkpoint's format and the filesystem it lies on."""
    if checkpoint.format == "dcp":
        return DcpOracle(checkpoint)
    if not all(map(_can_map, checkpoint.local_files)):
        return PlainOracle(checkpoint)
    if any(file.suffix != ".safetensors" for file in checkpoint.local_files):
        return TorchFileOracle(checkpoint)
    return SafetensorsOracle(checkpoint)


class DcpReader(FileSystemReader):
    """Torch's reader of one checkpoint, with the metadata read once, and only after ours has.

    Torch does whatever `.metadata` says, and reads only what the same torch and Python wrote (see
    `torch_metadata`). And where it cannot be read, `dcp.load` would log a traceback, look for other
    files and then complain of those.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        read_metadata(folder)
        self._metadata = unpickle_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def load_dcp(reader: DcpReader, tensors: Sequence[TensorInfo]) -> dict[str, Tensor]:
    """``tensors`` of a checkpoint, whole, through `dcp.load`.

    Raises `FailedError` where torch fails, ``OSError``.
    """
    state = {
        tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in tensors
    }
    if state:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            try:
                dcp_load(state, storage_reader=reader, no_dist=True)
            except CheckpointException as wrapped:
                # A BaseException whose own text is only that some rank failed.
                cause = next((error for error, _ in wrapped.failures.values()), wrapped)
                if not isinstance(cause, Exception) or isinstance(cause, OSError):
                    raise cause from None
                reason = str(cause).split("\n", maxsplit=1)[0]
                raise FailedError(
                    f"{reader.path}: torch's own loader fails on it ({type(cause).__name__}: "
                    f"{reason}); its files are damaged"
                ) from wrapped
    return state
