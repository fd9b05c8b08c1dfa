"""Rows of a tensor whose pieces are cut by rows and by columns, as ranks of two meshes save them."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from llamaconv import open_checkpoint
from llamaconv.checkpoint.reader import PieceReader

STEP = 4


class Cut(DefaultSavePlanner):
    """Saves every tensor in pieces of `STEP` rows and columns, the last ones shorter."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [self.item(name, at) for name in self.state_dict for at in self.places(name)]
        )

    def places(self, name: str) -> list[tuple[int, ...]]:
        return list(product(*(range(0, size, STEP) for size in self.state_dict[name].shape)))

    def item(self, name: str, at: tuple[int, ...]) -> WriteItem:
        tensor, offsets = self.state_dict[name], torch.Size(at)
        chunk = ChunkStorageMetadata(offsets, self.part(name, at).size())
        data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.size())
        return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def part(self, name: str, at: Any) -> torch.Tensor:
        return self.state_dict[name][tuple(slice(start, start + STEP) for start in at)].clone()

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.part(write_item.index.fqn, write_item.index.offset)


def test_any_rows_of_pieces_cut_by_rows_and_columns(tmp_path: Path) -> None:
    state = {
        "norm.weight": torch.randn(7),
        "output.weight": torch.randn(10, 7, dtype=torch.float64),
        "tok_embeddings.weight": torch.randn(10, 7).to(torch.bfloat16),
    }
    save(state, checkpoint_id=tmp_path, planner=Cut(flatten_state_dict=False), no_dist=True)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.problems
    assert [len(tensor.pieces) for tensor in checkpoint.tensors.values()] == [2, 6, 6]
    with PieceReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            for first, last in ((0, tensor.n_rows), (2, 6), (tensor.n_rows - 1, tensor.n_rows)):
                wanted = state[name][first:last].contiguous().view(-1).view(torch.uint8)
                buffer = bytearray(wanted.numel())
                reader.read_rows(tensor, first, last, memoryview(buffer))
                assert bytes(buffer) == wanted.numpy().tobytes(), (name, first, last)
