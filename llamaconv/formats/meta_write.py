"""Writing Meta's original files: ``consolidated.NN.pth`` and a params.json that means the same.

Each file is one ``torch.save`` of a dict, streamed. With several files every file has its part
of each matrix, as Meta's model-parallel layers expect (llama-models, models/llama3/model.py).
A matrix that is cut by columns is read once for every file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from llamaconv import keys
from llamaconv.formats.blocks import Blocks, File, rows_payload, write_files
from llamaconv.formats.output import Output, Payload
from llamaconv.formats.torch_stream import save_streamed, without_data
from llamaconv.params import LlamaParams
from llamaconv.params_json import to_params_json
from llamaconv.pieces import DTYPE_BYTES, TensorInfo
from llamaconv.ranks import ALONE, Ranks
from llamaconv.scratch import Reused
from llamaconv.small_files import copy_file, write_text


def write(
    folder: Path,
    tensors: Sequence[TensorInfo],
    n_files: int,
    blocks: Blocks,
    workers: int,
    ranks: Ranks = ALONE,
) -> dict[str, list[str]]:
    """Write ``tensors`` (pieces not needed) to ``n_files`` model-parallel files.

    Returns the xxh3-128 digest of each part's bytes by tensor, a norm's once for its copies.
    Raises what ``blocks`` raises, and ``OSError``.
    """
    nbytes = sum(tensor.nbytes for tensor in tensors) // n_files
    files = [
        File(
            f"consolidated.{number:02d}.pth",
            nbytes,
            partial(_write_file, tensors, number, n_files, blocks),
        )
        for number in range(n_files)
    ]
    digests = write_files(folder, files, blocks, workers, ranks)
    return {
        tensor.name: [digests[n][i] for n in range(n_files if len(tensor.shape) == 2 else 1)]
        for i, tensor in enumerate(tensors)
    }


def _write_file(
    tensors: Sequence[TensorInfo],
    number: int,
    n_files: int,
    blocks: Blocks,
    output: Output,
) -> list[str]:
    parts = [_part(tensor, number, n_files) for tensor in tensors]
    state = without_data(
        {
            tensor.name: (shape, getattr(torch, tensor.dtype))
            for tensor, (_, shape) in zip(tensors, parts, strict=True)
        }
    )
    payloads = (
        _payload(tensor, start, shape, blocks)
        for tensor, (start, shape) in zip(tensors, parts, strict=True)
    )
    return save_streamed(state, output, payloads)


def _part(tensor: TensorInfo, number: int, n_files: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of the part that file ``number`` holds."""
    start, shape = [0] * len(tensor.shape), list(tensor.shape)
    if len(shape) == 2:
        axis = keys.cut_axis(tensor.name)
        shape[axis] //= n_files
        start[axis] = number * shape[axis]
    return tuple(start), tuple(shape)


def _payload(
    tensor: TensorInfo, start: tuple[int, ...], shape: tuple[int, ...], blocks: Blocks
) -> Payload:
    item = DTYPE_BYTES[tensor.dtype]
    row_bytes = prod(shape[1:]) * item
    whole = rows_payload(blocks, tensor.name, start[0], start[0] + shape[0], row_bytes)
    if shape[1:] == tensor.shape[1:]:
        return whole

    def columns(row: int) -> Iterator[memoryview]:
        left, right = start[1] * item, (start[1] + shape[1]) * item
        buffer = Reused()
        for block in whole.blocks(row):
            rows = torch.frombuffer(block, dtype=torch.uint8).view(-1, tensor.row_bytes)
            cut = rows[:, left:right]
            out = buffer.take(cut.numel())
            torch.frombuffer(out, dtype=torch.uint8).view(cut.shape).copy_(cut)
            yield out

    return replace(whole, blocks=columns)


def write_params(folder: Path, params: LlamaParams, assets: Path | None) -> None:
    """params.json, and Meta's tokenizer where ``assets`` has it."""
    write_text(folder / "params.json", json.dumps(to_params_json(params), indent=1) + "\n")
    for place in (assets, assets / "original") if assets is not None else ():
        if (place / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists():
            copy_file(place / "tokenizer.model", folder / "tokenizer.model")
