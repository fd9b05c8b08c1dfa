"""Writing PyTorch Distributed Checkpoints, through torch's own writer.

`torch.distributed.checkpoint.save` with a planner that says which row chunks there are and a
storage writer that puts the bytes down. Each entry of a ``.distcp`` file is what ``torch.save``
writes for one tensor: torch writes the envelope around an unmaterialised tensor
(``torch.serialization.skip_data``), and where the bytes belong it seeks past them; the stream
answers that seek by letting the bytes through. So torch keeps ownership of the format, and no
tensor is ever whole in memory.

The concession: the checksums inside the envelope are those of an entry without data, which
``torch.load`` does not check (nor with ``torch.serialization.set_crc32_options(False)``);
tools other than torch may complain. The receipt carries a digest a piece instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import Metadata as TorchMetadata
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llamaconv.formats.blocks import Blocks, File, rows_payload, write_files
from llamaconv.formats.dcp_metadata import Entry, Metadata, Offsets, Place, UnknownEntry
from llamaconv.formats.dcp_metadata_write import write_metadata
from llamaconv.formats.output import Output
from llamaconv.formats.torch_stream import save_streamed, without_data
from llamaconv.pieces import TensorInfo
from llamaconv.ranks import ALONE, Ranks


def write(
    folder: Path,
    tensors: Sequence[TensorInfo],
    shards: int,
    blocks: Blocks,
    workers: int,
    ranks: Ranks = ALONE,
) -> dict[str, list[str]]:
    """Write a checkpoint of ``tensors`` (pieces not needed) to ``folder``.

    ``shards`` cuts each tensor into that many row chunks, as ``torch.chunk`` does. Returns the
    xxh3-128 digest of each chunk's bytes, in order, by tensor. Raises what ``blocks`` raises,
    and ``OSError`` from the disk.
    """
    writer = _StreamWriter(folder, blocks, workers, ranks)
    planner = _ChunkPlanner(tensors, shards)
    if not ranks.first:
        # Rank 0's torch makes the metadata, of what all ranks wrote; the files are the same
        # however many ranks there are.
        writer.write_items(planner.create_local_plan().items)
        return writer.digests()
    try:
        with warnings.catch_warnings():
            # torch says on every save of one process that it saves in one process.
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            dcp_save(
                {},  # the planner knows the tensors, there are none in memory
                storage_writer=writer,
                planner=planner,
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

    def __init__(self, folder: Path, blocks: Blocks, workers: int, ranks: Ranks) -> None:
        super().__init__(folder)
        self.folder = folder
        self.blocks = blocks
        self.workers = workers
        self.ranks = ranks
        self._digests: dict[tuple[str, int], str] = {}

    def finish(self, metadata: TorchMetadata, results: list[list[WriteResult]]) -> None:
        """Write what torch's planner and we have found, in the form that every torch reads."""
        entries: dict[str, Entry | UnknownEntry | None] = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            dtype = str(found.properties.dtype).removeprefix("torch.")
            chunks = tuple((tuple(one.offsets), tuple(one.sizes)) for one in found.chunks)
            entries[name] = Entry(dtype, tuple(found.size), chunks)
        places: dict[tuple[str, Offsets | None], Place] = {}
        for written in (result for one in results for result in one):
            info: _StorageInfo = written.storage_data
            assert written.index.offset is not None
            place = Place(info.relative_path, info.offset, info.length)
            places[written.index.fqn, tuple(written.index.offset)] = place
        write_metadata(self.folder, Metadata(entries, places))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self.write_items(plan.items))
        return future

    def write_items(self, items: list[WriteItem]) -> list[WriteResult]:
        """Writes this rank's share of the files; the results and digests of all ranks' entries."""
        by_file = list(_files(items))
        files = [
            # Named as torch names the files of its first rank.
            File(f"__0_{number}.distcp", sum(map(_nbytes, group)), partial(self._write_file, group))
            for number, group in enumerate(by_file)
        ]
        results = []
        found = write_files(self.folder, files, self.blocks, self.workers, self.ranks)
        for file, group, entries in zip(files, by_file, found, strict=True):
            for item, (begin, length, digest) in zip(group, entries, strict=True):
                assert item.index.offset is not None
                self._digests[item.index.fqn, item.index.offset[0]] = digest
                place = _StorageInfo(file.name, begin, length)
                results.append(WriteResult(item.index, length, place))
        return results

    def _write_file(self, items: list[WriteItem], output: Output) -> list[tuple[int, int, str]]:
        """Begin, length in bytes, and digest of each item's entry."""
        return [self._write_entry(item, output) for item in items]

    def _write_entry(self, item: WriteItem, output: Output) -> tuple[int, int, str]:
        assert item.tensor_data and item.index.offset is not None
        begin = output.tell()
        name, first, sizes = item.index.fqn, item.index.offset[0], item.tensor_data.chunk.sizes
        dtype = item.tensor_data.properties.dtype
        tensor = without_data({name: (tuple(sizes), dtype)})[name]
        row_bytes = sizes[1:].numel() * dtype.itemsize
        payload = rows_payload(self.blocks, name, first, first + sizes[0], row_bytes)
        (digest,) = save_streamed(tensor, output, [payload])
        return begin, output.tell() - begin, digest

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
