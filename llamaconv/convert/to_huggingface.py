"""Write a Hugging Face folder: shards streamed, an index of them, the small files copied.

A ``.safetensors`` file is a length, a JSON header and the bytes in order, so blocks go straight
from the engine to the file. config.json is written from the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.huggingface import CONFIG
from llamaconv.checkpoint.huggingface_index import INDEX, SINGLE
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.untrusted.files import open_bytes
from llamaconv.checkpoint.untrusted.safetensors_header import DTYPES, read_safetensors_header
from llamaconv.convert.destination import Destination, File
from llamaconv.convert.output import CountedBlocks, Output, Payload
from llamaconv.convert.small_files import put_text
from llamaconv.convert.write_files import write_files
from llamaconv.model.config_json import to_config
from llamaconv.plan.plan import Plan
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import FailedError

_STORED = {dtype: name for name, dtype in DTYPES.items()}


def write_huggingface(
    target: Destination,
    tensors: Sequence[TensorInfo],
    max_shard_size: int,
    blocks: CountedBlocks,
    workers: int,
    ranks: Ranks = ALONE,
) -> dict[str, list[str]]:
    """Write shards, and an index if there are several.

    Args:
        target: The target to fill.
        tensors: The target's tensors, without pieces.
        max_shard_size: Most bytes of tensors per shard; a longer tensor gets a shard of its own.
        blocks: Where the bytes come from.
        workers: Writer threads of this rank.
        ranks: The processes that share the files.

    Returns:
        The xxh3-128 digest of each tensor's bytes by name, in a list of one.

    Raises:
        OSError: The disk failed; and what ``blocks`` raises.
    """
    shards = list(_shards(tensors, max_shard_size))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    files = []
    for name, shard in zip(names, shards, strict=True):
        payloads = [Payload(blocks, t.name, 0, t.n_rows, t.row_bytes) for t in shard]
        files.append(File(name, payloads, partial(_write_shard, shard, payloads, blocks)))
    digests: dict[str, list[str]] = {}
    for found in write_files(target, files, blocks, workers, ranks):
        digests |= found
    if len(shards) > 1 and ranks.first:
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors)
        _dump(target, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def _shards(tensors: Sequence[TensorInfo], most: int) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.nbytes > most:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.nbytes
    if shard:
        yield shard


def _write_shard(
    shard: list[TensorInfo], payloads: list[Payload], blocks: CountedBlocks, output: Output
) -> dict[str, list[str]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": _STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file: the data begins at a multiple of 8, as the library pads it.
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little") + text)
    if blocks.are_read_back:
        output.reserve(output.tell() + end)
    digests = {}
    for tensor, payload in zip(shard, payloads, strict=True):
        n_bytes, digest = output.stream(payload)
        digests[tensor.name] = [digest]
        if output.readable is not None:
            blocks.can_be_read(tensor.name, n_bytes, partial(_piece, output.readable, tensor.name))
    return digests


def _piece(path: Path, name: str) -> Piece:
    """Return where a tensor is, by the header of its file."""
    with open_bytes(path) as source:
        tensors, problems = read_safetensors_header(path, source)
    if name not in tensors:
        raise FailedError(problems or f"{path}: {name} is not in its header")
    (piece,) = tensors[name].pieces
    return piece


def write_config(target: Destination, plan: Plan) -> None:
    """Write config.json for what ``plan`` writes."""
    params, _ = plan.ready()
    dtypes = {move.dtype for move in plan.written}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    roles = {move.place[0] for move in plan.written}
    _dump(target, CONFIG, to_config(params, dtype, plan.further, roles))


def _dump(target: Destination, name: str, content: Mapping[str, Any]) -> None:
    put_text(target, name, json.dumps(content, indent=2) + "\n")
