"""Metadata of a DCP that came apart: every value of a wrong type is refused by name."""

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, open_checkpoint
from llamaconv.checkpoint.tensors import Piece, TensorInfo

Bend = Callable[[Any], Any]


def place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["norm.weight"]


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda m: setattr(m, "storage_data", None), "no tensors, or no files"),
        (lambda m: setattr(m, "state_dict_metadata", []), "no tensors, or no files"),
        (lambda m: m.state_dict_metadata.update({7: entry(m)}), "the name of a tensor is not text"),
        (
            lambda m: m.storage_data.update({"norm.weight": place(m)}),
            "expected a MetadataIndex",
        ),
        (lambda m: setattr(place(m), "relative_path", 1), "the file 1 of an entry is outside"),
        (lambda m: setattr(place(m), "offset", -1), "invalid offset or length of an entry"),
        (lambda m: delattr(place(m), "length"), "invalid offset or length of an entry"),
        (
            lambda m: setattr(place(m), "transform_descriptors", ["zstd"]),
            "are compressed or encrypted",
        ),
        (lambda m: setattr(entry(m), "size", (7, 2.0)), "whole numbers"),
        (lambda m: setattr(entry(m), "chunks", None), "norm.weight has no list of chunks"),
        (
            lambda m: setattr(entry(m), "properties", None),
            "norm.weight: invalid properties",
        ),
        (
            lambda m: setattr(entry(m).properties, "dtype", "float32"),
            "norm.weight: invalid dtype",
        ),
        (lambda m: entry(m).chunks.append(None), "expected a ChunkStorageMetadata"),
        (lambda m: setattr(entry(m).chunks[0], "sizes", (7, 1)), "chunks of other dimensions"),
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path: Path, bend: Bend, said: str) -> None:
    save({"norm.weight": torch.randn(7)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    bend(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / ".metadata") in str(caught.value)


def test_short_pickle_cannot_allocate_gigabytes(tmp_path: Path) -> None:
    """Its machine would make room for 16 million things that it remembers (125 MB, or any more)."""
    (tmp_path / ".metadata").write_bytes(b"Nr" + struct.pack("<I", 1 << 23) + b".")
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError, match="its memo is not filled in order"):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.reset_peak()
        pickle.loads((tmp_path / ".metadata").read_bytes())
        assert tracemalloc.get_traced_memory()[1] > 100_000_000, "the refusal is what saved it"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("spans", "wrong"),
    [
        ([(0, 0, 4, 6)], ""),
        ([(0, 0, 1, 6), (1, 0, 3, 6)], ""),
        ([(0, 0, 4, 2), (0, 2, 4, 4)], ""),
        ([(0, 0, 2, 3), (0, 3, 1, 3), (1, 3, 3, 3), (2, 0, 2, 3)], ""),
        ([(0, 0, 0, 6), (0, 0, 4, 6)], ""),
        ([(0, 0, 2, 6), (1, 0, 2, 6)], "overlap"),
        ([(0, 0, 2, 6), (0, 0, 2, 6)], "overlap"),
        ([(0, 0, 4, 3), (0, 2, 4, 3)], "overlap"),
        ([(0, 0, 3, 2), (1, 1, 3, 6 - 1), (0, 2, 1, 3)], "overlap"),
        ([(0, 0, 2, 6)], "12 elements instead of 24"),
        ([(0, 0, 5, 6)], "reaches beyond"),
    ],
)
def test_pieces_that_leave_gaps_or_overlap_are_an_error(
    spans: list[tuple[int, ...]], wrong: str
) -> None:
    pieces = tuple(Piece(Path("file"), 0, (a, b), (n, m)) for a, b, n, m in spans)
    said = TensorInfo("name", "float32", (4, 6), pieces).coverage_error()
    assert wrong in said
    assert bool(said) == bool(wrong)


def test_coverage_of_100_000_pieces_is_checked() -> None:
    """100,000 columns of one element: not each against each."""
    pieces = tuple(Piece(Path("file"), 0, (0, n), (1, 1)) for n in range(100_000))
    assert not TensorInfo("name", "float32", (1, 100_000), pieces).coverage_error()
    again = (*pieces[:-1], replace(pieces[-1], start=(0, 5)))
    assert "overlap" in TensorInfo("name", "float32", (1, 100_000), again).coverage_error()
