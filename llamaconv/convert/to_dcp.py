"""Write PyTorch Distributed Checkpoints, through torch's own writer.

``torch.distributed.checkpoint.save`` runs with a planner that lists the row chunks, and a storage
writer that writes their bytes. Each entry of a ``.distcp`` file is what ``torch.save`` writes for
one tensor, see `torch_stream`, which also states a concession about checksums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
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
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from llamaconv.checkpoint.dcp import payload_offset
from llamaconv.checkpoint.folder import LocalFolder
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.untrusted.dcp_metadata import (
    NAME,
    EntryLocation,
    Metadata,
    Offsets,
    TensorEntry,
    UnknownEntry,
)
from llamaconv.convert.copied_values import ValueBlocks
from llamaconv.convert.destination import Destination, File
from llamaconv.convert.joined import Joined, JoinedBlocks
from llamaconv.convert.metadata_bytes import encoded
from llamaconv.convert.output import CountedBlocks, Output, Payload
from llamaconv.convert.torch_stream import save_streamed, without_data
from llamaconv.convert.write_files import write_files
from llamaconv.plan.plan import ValueCopy
from llamaconv.ranks import ALONE, Ranks


def write_dcp(
    target: Destination,
    tensors: Sequence[TensorInfo],
    shards: int,
    blocks: CountedBlocks,
    workers: int,
    ranks: Ranks = ALONE,
    joined: Mapping[str, Joined] | None = None,
    values: Sequence[ValueCopy] = (),
) -> dict[str, list[str]]:
    """Write a distributed checkpoint.

    Args:
        target: The target to fill.
        tensors: The target's tensors, without pieces.
        shards: Row chunks per tensor, cut as ``torch.chunk`` does; of a `Joined` one, along its axis.
        blocks: Where the bytes come from.
        workers: Writer threads of this rank.
        ranks: The processes that share the files.
        joined: The tensors that consist of rows of several, which ``blocks`` has.
        values: The entries that are no tensors.

    Returns:
        The xxh3-128 digests of each tensor's chunks, in order, by name; and of each value's bytes.

    Raises:
        OSError: The disk failed; and what ``blocks`` raises.
    """
    joined = joined or {}
    copies = {copy.target: copy for copy in values}
    writer = _StreamWriter(target, blocks, workers, ranks, joined, copies)
    planner = _ChunkPlanner(tensors, shards, joined, copies)
    if not ranks.first:
        # Rank 0's torch writes the metadata of what all ranks wrote. The files do not depend on
        # the number of ranks.
        writer.write_items(planner.create_local_plan().items)
        return writer.digests()
    try:
        with warnings.catch_warnings():
            # torch warns about every save of one process.
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
    """Plan the row chunks of each tensor, without tensors."""

    def __init__(
        self,
        tensors: Sequence[TensorInfo],
        shards: int,
        joined: Mapping[str, Joined],
        values: Iterable[str],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors
        self.shards = shards
        self.joined = joined
        self.values = values

    def create_local_plan(self) -> SavePlan:
        items = [item for tensor in self.tensors for item in self._items(tensor)]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.values]
        self.plan = SavePlan(items)
        return self.plan

    def _items(self, tensor: TensorInfo) -> Iterator[WriteItem]:
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        axis = self.joined[tensor.name].axis if tensor.name in self.joined else 0
        length = tensor.shape[axis] if tensor.shape else 1
        step = -(-length // self.shards)
        for number, first in enumerate(range(0, length, step)):
            end = min(first + step, length)
            offsets = torch.Size([first if at == axis else 0 for at in range(len(tensor.shape))])
            sizes = torch.Size(
                [end - first if at == axis else n for at, n in enumerate(tensor.shape)]
            )
            yield WriteItem(
                index=MetadataIndex(tensor.name, offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, sizes),
                    properties=properties,
                    size=torch.Size(tensor.shape),
                ),
            )


class _StreamWriter(StorageWriter):
    """Write torch's file layout and metadata, with bytes from ``blocks`` instead of tensors."""

    def __init__(
        self,
        target: Destination,
        blocks: CountedBlocks,
        workers: int,
        ranks: Ranks,
        joined: Mapping[str, Joined],
        values: Mapping[str, ValueCopy],
    ) -> None:
        self.target = target
        self.blocks = blocks
        self.workers = workers
        self.ranks = ranks
        self.joined = joined
        self.values = values
        self._digests: dict[tuple[str, Offsets], str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Keep the target: it is known already."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the target is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True

    def finish(self, metadata: TorchMetadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata in the form that every torch reads."""
        entries: dict[str, TensorEntry | UnknownEntry | None] = {}
        for name, found in metadata.state_dict_metadata.items():
            if not isinstance(found, TensorStorageMetadata):
                entries[name] = None
                continue
            dtype = str(found.properties.dtype).removeprefix("torch.")
            chunks = tuple((tuple(one.offsets), tuple(one.sizes)) for one in found.chunks)
            entries[name] = TensorEntry(dtype, tuple(found.size), chunks)
        locations: dict[tuple[str, Offsets | None], EntryLocation] = {}
        for written in (result for one in results for result in one):
            info: _StorageInfo = written.storage_data
            place = EntryLocation(info.relative_path, info.offset, info.length)
            locations[written.index.fqn, _offsets(written.index)] = place
        self.target.put(NAME, encoded(Metadata(entries, locations)))

    def write_data(self, plan: SavePlan, _planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self.write_items(plan.items))
        return future

    def write_items(self, items: list[WriteItem]) -> list[WriteResult]:
        """Write this rank's share of the files; return the results of all ranks."""
        by_file = list(_files(item for item in items if item.tensor_data))
        if values := [item for item in items if not item.tensor_data]:
            by_file.append(values)
        files = []
        for number, group in enumerate(by_file):
            payloads = [self._payload(item) for item in group]
            write = partial(self._write_file, group, payloads)
            # Named as torch names the files of its first rank.
            files.append(File(f"__0_{number}.distcp", payloads, write))
        results = []
        found = write_files(self.target, files, self.blocks, self.workers, self.ranks)
        for file, group, entries in zip(files, by_file, found, strict=True):
            for item, (begin, length, digest) in zip(group, entries, strict=True):
                self._digests[item.index.fqn, _offsets(item.index) or ()] = digest
                place = _StorageInfo(file.name, begin, length)
                results.append(WriteResult(item.index, length, place))
        return results

    def _write_file(
        self, items: list[WriteItem], payloads: list[Payload], output: Output
    ) -> list[tuple[int, int, str]]:
        """Write the entries of a file; return the offset, length in bytes and digest of each."""
        entries = []
        for item, payload in zip(items, payloads, strict=True):
            begin, length, digest = _write_entry(item, payload, output)
            entries.append((begin, length, digest))
            if item.tensor_data and output.readable is not None:
                entry = partial(_piece, item, output.readable, begin, length)
                self.blocks.can_be_read(item.index.fqn, _nbytes(item), entry)
        return entries

    def _payload(self, item: WriteItem) -> Payload:
        name = item.index.fqn
        if not item.tensor_data:
            value = self.values[name].source
            return Payload(ValueBlocks(value), name, 0, value.length, 1)
        assert item.index.offset is not None
        offsets, sizes = item.index.offset, item.tensor_data.chunk.sizes
        dtype = item.tensor_data.properties.dtype
        if name in self.joined:
            blocks = JoinedBlocks(self.blocks, self.joined[name].chunk(offsets, sizes))
            return Payload(blocks, name, 0, sizes[:-1].numel(), sizes[-1] * dtype.itemsize)
        # A scalar is one row.
        first, n_rows = (offsets[0], sizes[0]) if sizes else (0, 1)
        row_bytes = sizes[1:].numel() * dtype.itemsize
        return Payload(self.blocks, name, first, first + n_rows, row_bytes)

    def digests(self) -> dict[str, list[str]]:
        by_name: dict[str, list[str]] = {}
        for (name, _), digest in sorted(self._digests.items()):
            by_name.setdefault(name, []).append(digest)
        return by_name


def _offsets(index: MetadataIndex) -> Offsets | None:
    return None if index.offset is None else tuple(index.offset)


def _write_entry(item: WriteItem, payload: Payload, output: Output) -> tuple[int, int, str]:
    begin, name = output.tell(), item.index.fqn
    if not item.tensor_data:
        return (begin, *output.stream(payload))
    shape = tuple(item.tensor_data.chunk.sizes)
    tensor = without_data({name: (shape, item.tensor_data.properties.dtype)})[name]
    (digest,) = save_streamed(tensor, output, [payload])
    return begin, output.tell() - begin, digest


def _piece(item: WriteItem, path: Path, begin: int, length: int) -> Piece:
    """Return where the values of an entry are, by its own header."""
    assert item.tensor_data is not None
    dtype = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    sizes = tuple(item.tensor_data.chunk.sizes)
    place = EntryLocation(path.name, begin, length)
    offset = payload_offset(LocalFolder(path.parent), place, dtype, sizes)
    return Piece(path, offset, _offsets(item.index) or (), sizes)


def _files(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Group items by file: chunk i of all tensors together, in several files if it is long.

    Several files let several threads write, and let one file be flushed while the next is written.
    A large model has up to 64 files per chunk; a small one has files of 256 MiB. The first files of
    all chunks come first, so that whole tensors are soon there to be compared.
    """
    items = list(items)
    by_chunk: dict[int, list[WriteItem]] = {}
    for item in items:
        by_chunk.setdefault(item.index.index or 0, []).append(item)
    most = max(256 << 20, sum(map(_nbytes, items)) // (64 * len(by_chunk)))
    rounds = zip_longest(*(_cut(chunk, most) for chunk in by_chunk.values()))
    yield from (file for one in rounds for file in one if file)


def _cut(items: Iterable[WriteItem], most: int) -> Iterator[list[WriteItem]]:
    """Cut items into files of at most so many bytes; a longer item has a file of its own."""
    file: list[WriteItem] = []
    filled = 0
    for item in items:
        if file and filled + _nbytes(item) > most:
            yield file
            file, filled = [], 0
        file.append(item)
        filled += _nbytes(item)
    if file:
        yield file


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
