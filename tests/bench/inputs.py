"""What the measurements read: Hugging Face folders of any size, of random bits or of nothing.

Random bits lie in the range of plausible bf16 weights, so that scores are numbers. A sparse
folder has true headers over files without blocks: it reads as zeros and costs no disk, for what
asks about memory or about headers alone. Written a block at a time, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from llamaconv.model.config_json import to_config
from llamaconv.model.names import every_role
from llamaconv.model.params import LlamaParams, RopeScaling

_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
_8B = LlamaParams(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=_SCALING,
    max_position=131072,
)
# Meta's published models (the tied 1B stores no head), as their config.json has them.
SHAPES = {
    "1B": replace(_8B, dim=2048, n_layers=16, head_dim=64, ffn_dim=8192, tied=True),
    "8B": _8B,
    "70B": replace(_8B, dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "405B": replace(_8B, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
}
_SMALL = replace(_8B, dim=1024, n_heads=16, head_dim=64, ffn_dim=4096, vocab_size=32000)
_ITEM = 2  # bytes of a bfloat16
_BLOCK_ITEMS = 8 << 20


def of_size(n_bytes: float) -> LlamaParams:
    """An untied Llama of about so many bytes in bf16: widths of 8B, 1B or less, layers as needed."""
    base = replace(SHAPES["1B"], tied=False)
    if n_bytes >= 12e9:
        base = _8B
    elif n_bytes < 1.5e9:
        base = _SMALL
    one, two = (size(replace(base, n_layers=n)) for n in (1, 2))
    return replace(base, n_layers=max(1, 1 + round((n_bytes - one) / (two - one))))


def size(params: LlamaParams) -> int:
    """Bytes of all tensors that a folder of ``params`` stores, in bf16."""
    return sum(_ITEM * prod(shape) for _, shape in _tensors(params))


def write(
    folder: Path, params: LlamaParams, *, sparse: bool = False, longest_file: float = 5e9
) -> Path:
    """A Hugging Face folder of ``params`` in bf16, its files at most ``longest_file`` bytes."""
    folder.mkdir(parents=True)
    files = list(_files(params, longest_file))
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, tensors, number, sparse)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": size(params)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_config(params, "bfloat16")))
    return folder


def _tensors(params: LlamaParams) -> Iterator[tuple[str, tuple[int, ...]]]:
    for role, layer in every_role(params):
        name = role.in_naming("huggingface", layer)
        if name and not (params.tied and role.name == "output"):
            yield name, role.shape(params)


def _files(params: LlamaParams, longest: float) -> Iterator[dict[str, tuple[int, ...]]]:
    file: dict[str, tuple[int, ...]] = {}
    for name, shape in _tensors(params):
        if file and _ITEM * sum(map(prod, [*file.values(), shape])) > longest:
            yield file
            file = {}
        file[name] = shape
    yield file


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], seed: int, sparse: bool) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        offsets = [end, end := end + _ITEM * prod(shape)]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + end)
            return
        import numpy

        random = numpy.random.default_rng(seed)
        for start in range(0, end // _ITEM, _BLOCK_ITEMS):
            n_items = min(_BLOCK_ITEMS, end // _ITEM - start)
            # As bf16 these are 0.001 to 1.4; the lower bits are all random.
            file.write(random.integers(15000, 16310, n_items, dtype=numpy.int16).data)
