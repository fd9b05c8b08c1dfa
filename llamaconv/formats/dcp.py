"""PyTorch Distributed Checkpoints: opened from their metadata, written through torch's own.

Writing: `torch.distributed.checkpoint.save` with a planner that says which row chunks there
are and a storage writer that puts the bytes down. Each entry of a ``.distcp`` file is what
``torch.save`` writes for one tensor: torch writes the envelope around an unmaterialised tensor
(``torch.serialization.skip_data``), and where the bytes belong it seeks past them; the stream
answers that seek by letting the bytes through. So torch keeps ownership of the format, and no
tensor is ever whole in memory.

The concession: the checksums inside the envelope are those of an entry without data, which
``torch.load`` does not check (nor with ``torch.serialization.set_crc32_options(False)``);
tools other than torch may complain. The receipt carries a digest a piece instead.

Reading: ``.metadata`` is a pickle, so only the classes that a checkpoint needs are admitted.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from llamaconv import keys, receipt
from llamaconv.formats.blocks import Blocks
from llamaconv.formats.torch_stream import save_streamed
from llamaconv.pieces import DTYPE_BYTES, Checkpoint, Ignored, Piece, TensorInfo
from llamaconv.problems import FailedError, Problem, RefusedError, some, warning
from llamaconv.titan import GENERATIONS

METADATA = ".metadata"

# What a reader passes by: optimizer and trainer state of a full training checkpoint.
_TRAINER_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state", "ft_dataloader")

# Writing


def write(
    folder: Path, tensors: Sequence[TensorInfo], shards: int, blocks: Blocks, workers: int
) -> dict[str, list[str]]:
    """Write a checkpoint of ``tensors`` (pieces not needed) to ``folder``.

    ``shards`` cuts each tensor into that many row chunks, as ``torch.chunk`` does. Returns the
    xxh3-128 digest of each chunk's bytes, in order, by tensor. Raises what ``blocks`` raises,
    and ``OSError`` from the disk.
    """
    writer = _StreamWriter(folder, blocks, workers)
    try:
        with warnings.catch_warnings():
            # torch says on every save of one process that it saves in one process.
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            dcp_save(
                {},  # the planner knows the tensors, there are none in memory
                storage_writer=writer,
                planner=_ChunkPlanner(tensors, shards),
                no_dist=True,
            )
    except CheckpointException as wrapped:
        # A BaseException that hides the cause, Ctrl-C included: let the cause out.
        for error, _ in wrapped.failures.values():
            raise error from None
        raise
    return writer.digests()


class _ChunkPlanner(DefaultSavePlanner):
    """Plans the row chunks of each tensor; there is no tensor behind them yet."""

    def __init__(self, tensors: Sequence[TensorInfo], shards: int) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for tensor in self.tensors for item in self._items(tensor)])
        return self.plan

    def _items(self, tensor: TensorInfo) -> Iterator[WriteItem]:
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        columns = tensor.shape[1:]
        step = -(-tensor.n_rows // self.shards)
        for number, first in enumerate(range(0, tensor.n_rows, step)):
            offsets = torch.Size([first, *[0] * len(columns)])
            sizes = torch.Size([min(step, tensor.n_rows - first), *columns])
            yield WriteItem(
                index=MetadataIndex(tensor.name, offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, sizes),
                    properties=properties,
                    size=torch.Size(tensor.shape),
                ),
            )


class _StreamWriter(FileSystemWriter):
    """Torch's file layout and metadata; the bytes come from ``blocks`` instead of tensors."""

    def __init__(self, folder: Path, blocks: Blocks, workers: int) -> None:
        super().__init__(folder)
        self.blocks = blocks
        self.workers = workers
        self.stop = threading.Event()
        self._digests: dict[tuple[str, int], str] = {}

    def storage_meta(self) -> StorageMeta:
        # Torch would record the folder's path and a random id; without them the same
        # conversion gives the same bytes, and the folder can be moved.
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        names = (f"{plan.storage_data.prefix}{number}.distcp" for number in range(1 << 30))
        files = list(zip(names, _files(plan.items), strict=False))
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = [pool.submit(self._write_file, name, items) for name, items in files]
            try:
                results = [result for job in jobs for result in job.result()]
            except BaseException:
                self.stop.set()
                raise
        # A thread that lost its work must not end in metadata over bytes that are not there.
        if {result.index for result in results} != {item.index for item in plan.items}:
            raise FailedError("what was written is not what was planned; this is a bug")
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, name: str, items: list[WriteItem]) -> list[WriteResult]:
        results = []
        with open(Path(self.path) / name, "xb", buffering=0) as file:
            for item in items:
                if self.stop.is_set():
                    break
                results.append(self._write_entry(file, name, item))
            os.fsync(file.fileno())
        return results

    def _write_entry(self, file: BinaryIO, name: str, item: WriteItem) -> WriteResult:
        assert item.tensor_data and item.index.offset is not None
        begin = file.tell()
        first, n_rows = item.index.offset[0], item.tensor_data.chunk.sizes[0]
        # Memory that nobody touches costs address space only. (A FakeTensor would not cost even
        # that, but the first one imports a compiler, over a second.)
        tensor = torch.empty(item.tensor_data.chunk.sizes, dtype=item.tensor_data.properties.dtype)
        payload = self.blocks(item.index.fqn, first, first + n_rows)
        (digest,) = save_streamed(tensor, file, [payload], self.stop)
        self._digests[item.index.fqn, first] = digest
        length = file.tell() - begin
        return WriteResult(
            index=item.index,
            size_in_bytes=length,
            storage_data=_StorageInfo(name, begin, length),
        )

    def digests(self) -> dict[str, list[str]]:
        by_name: dict[str, list[str]] = {}
        for (name, _), digest in sorted(self._digests.items()):
            by_name.setdefault(name, []).append(digest)
        return by_name


def _files(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items a file: chunk i of every tensor together, cut where a file grows long.

    Several files let several threads write, and let one file reach the disk while the next
    is filled. At most 64 files a chunk for a large model, 256 MiB each for a small one.
    """
    items = list(items)
    by_chunk: dict[int, list[WriteItem]] = {}
    for item in items:
        by_chunk.setdefault(item.index.index or 0, []).append(item)
    most = max(256 << 20, sum(map(_nbytes, items)) // (64 * len(by_chunk)))
    for chunk in by_chunk.values():
        file: list[WriteItem] = []
        filled = 0
        for item in chunk:
            if file and filled + _nbytes(item) > most:
                yield file
                file, filled = [], 0
            file.append(item)
            filled += _nbytes(item)
        yield file


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


# Reading


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
    generation = _generation(tensors.keys() | (lost if not tensors else set()))
    if generation is None:
        problems.append(
            Problem(f"{folder}: names of no known TorchTitan generation: {some(tensors, 4)}")
        )
    return Checkpoint(
        path=folder,
        format="dcp",
        tensors=tensors,
        naming=generation,
        # Without a receipt the rows are taken to be what every TorchTitan release trains.
        rope=written.target["rope"] if written else "interleaved",
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
        found = path.stat().st_size if path.is_file() else None
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


def _generation(tensors: Iterable[str]) -> str | None:
    """The naming that every name fits, or None."""
    names = list(tensors)
    for generation in GENERATIONS:
        if names and all(keys.identify(name, generation) for name in names):
            return generation
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
    return TensorInfo(name, dtype, tuple(entry.size), tuple(pieces))


def payload_offset(
    file: BinaryIO, place: _StorageInfo, shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Where the bytes of one entry begin in its file, as torch itself finds them.

    Raises ``ValueError`` where the entry holds another tensor than the metadata says.
    """
    view = cast(IO[bytes], _create_file_view(cast(io.IOBase, file), place.offset, place.length))
    try:
        with torch.serialization.skip_data():
            tensor = torch.load(view, weights_only=True)
        view.seek(0)
        # An entry holds one tensor, so its storage is the first.
        inside: int = cast(Any, torch._C.PyTorchFileReader(view)).get_record_offset("data/0")
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"its entry in {place.relative_path} cannot be read: {error}") from error
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"its entry in {place.relative_path} holds {list(tensor.shape)} {tensor.dtype}, "
            f"the metadata says {list(shape)} {dtype}"
        )
    inside += tensor.storage_offset() * dtype.itemsize
    if inside + tensor.nbytes > place.length:
        raise ValueError(f"its entry in {place.relative_path} is cut short")
    return int(place.offset + inside)


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
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except RefusedError as error:
        raise RefusedError(
            [replace(p, message=f"{path}: {p.message}") for p in error.problems]
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise RefusedError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise RefusedError(f"{path}: holds no checkpoint metadata")
    return metadata
