"""Writing a Hugging Face folder: shards streamed, an index of what was written, the rest copied.

A ``.safetensors`` file is a length, a JSON header and the bytes in order, so blocks go straight
from the engine to the file. config.json is written from the parameters; generation config and
tokenizer come from the assets' folder, as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llamaconv.config import to_config
from llamaconv.files import read_json
from llamaconv.formats.blocks import Blocks, File, rows_payload, write_files
from llamaconv.formats.huggingface import ASSETS, INDEX, SINGLE
from llamaconv.formats.output import Output
from llamaconv.formats.safetensors_header import DTYPES
from llamaconv.params import LlamaParams
from llamaconv.pieces import TensorInfo
from llamaconv.ranks import ALONE, Ranks
from llamaconv.small_files import copy_file, write_text

_STORED = {dtype: name for name, dtype in DTYPES.items()}


def write(
    folder: Path,
    tensors: Sequence[TensorInfo],
    max_shard_size: int,
    blocks: Blocks,
    workers: int,
    ranks: Ranks = ALONE,
) -> dict[str, list[str]]:
    """Write ``tensors`` (pieces not needed) as shards of at most ``max_shard_size`` bytes each.

    A tensor that is longer gets a shard of its own. Returns the xxh3-128 digest of each tensor's
    bytes by name, in a list of one. Raises what ``blocks`` raises, and ``OSError``.
    """
    shards = list(_shards(tensors, max_shard_size))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    files = [
        File(name, sum(tensor.nbytes for tensor in shard), partial(_write_shard, shard, blocks))
        for name, shard in zip(names, shards, strict=True)
    ]
    digests: dict[str, list[str]] = {}
    for found in write_files(folder, files, blocks, workers, ranks):
        digests |= found
    if len(shards) > 1 and ranks.first:
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors)
        _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
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


def _write_shard(shard: list[TensorInfo], blocks: Blocks, output: Output) -> dict[str, list[str]]:
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
    payloads = (rows_payload(blocks, t.name, 0, t.n_rows, t.row_bytes) for t in shard)
    return {
        tensor.name: [output.stream(payload)[1]]
        for tensor, payload in zip(shard, payloads, strict=True)
    }


def write_assets(folder: Path, params: LlamaParams, dtypes: set[str], assets: Path | None) -> None:
    """config.json from ``params``, and what else ``assets`` has of a model's small files."""
    base: Mapping[str, Any] | None = None
    if assets is not None and (assets / "config.json").is_file():
        base = read_json(assets / "config.json")
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    _dump(folder / "config.json", to_config(params, dtype, base))
    if assets is not None:
        for name in ASSETS:
            if (assets / name).is_file():
                copy_file(assets / name, folder / name)


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
