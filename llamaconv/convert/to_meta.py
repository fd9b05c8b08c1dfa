"""Write Meta's original files: ``consolidated.NN.pth`` and a params.json that means the same.

Each file is one ``torch.save`` of a dict, streamed. With several files, every file has its part of
each matrix, as Meta's model-parallel layers expect (llama-models, models/llama3/model.py). A matrix
that is cut by columns is read once per file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from llamaconv.checkpoint.tensors import DTYPE_BYTES, TensorInfo
from llamaconv.convert.destination import Destination, File
from llamaconv.convert.output import CountedBlocks, Output, Payload
from llamaconv.convert.small_files import put_text
from llamaconv.convert.torch_stream import save_streamed, without_data
from llamaconv.convert.write_files import write_files
from llamaconv.model.names import cut_axis
from llamaconv.model.params import LlamaParams
from llamaconv.model.params_json import to_params_json
from llamaconv.ranks import ALONE, Ranks


def write_meta(
    target: Destination,
    tensors: Sequence[TensorInfo],
    n_files: int,
    blocks: CountedBlocks,
    workers: int,
    ranks: Ranks = ALONE,
) -> dict[str, list[str]]:
    """Write model-parallel files.

    Args:
        target: The target to fill.
        tensors: The target's tensors, without pieces.
        n_files: Number of files.
        blocks: Where the bytes come from.
        workers: Writer threads of this rank.
        ranks: The processes that share the files.

    Returns:
        The xxh3-128 digest of each part's bytes by tensor; one digest for all copies of a norm.

    Raises:
        OSError: The disk failed; and what ``blocks`` raises.
    """
    files = []
    for number in range(n_files):
        parts = [_part(tensor, number, n_files) for tensor in tensors]
        payloads = [
            _payload(tensor, start, shape, blocks)
            for tensor, (start, shape) in zip(tensors, parts, strict=True)
        ]
        state = {
            tensor.name: (shape, getattr(torch, tensor.dtype))
            for tensor, (_, shape) in zip(tensors, parts, strict=True)
        }
        write = partial(_write_file, state, payloads)
        files.append(File(f"consolidated.{number:02d}.pth", payloads, write))
    digests = write_files(target, files, blocks, workers, ranks)
    return {
        tensor.name: [digests[n][i] for n in range(n_files if len(tensor.shape) == 2 else 1)]
        for i, tensor in enumerate(tensors)
    }


def _write_file(
    state: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    payloads: Sequence[Payload],
    output: Output,
) -> list[str]:
    return save_streamed(without_data(state), output, payloads)


def _part(tensor: TensorInfo, number: int, n_files: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and shape of the part in file ``number``."""
    start, shape = [0] * len(tensor.shape), list(tensor.shape)
    if len(shape) == 2:
        axis = cut_axis(tensor.name)
        shape[axis] //= n_files
        start[axis] = number * shape[axis]
    return tuple(start), tuple(shape)


def _payload(
    tensor: TensorInfo, start: tuple[int, ...], shape: tuple[int, ...], blocks: CountedBlocks
) -> Payload:
    columns = None
    if shape[1:] != tensor.shape[1:]:
        item = DTYPE_BYTES[tensor.dtype]
        columns = (start[1] * item, (start[1] + shape[1]) * item)
    return Payload(blocks, tensor.name, start[0], start[0] + shape[0], tensor.row_bytes, columns)


def write_params(target: Destination, params: LlamaParams) -> None:
    """Write params.json."""
    put_text(target, "params.json", json.dumps(to_params_json(params), indent=1) + "\n")
