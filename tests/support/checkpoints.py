"""Tiny Hugging Face checkpoints made by code, for tests that bend them.

Head sizes of 8 and more (at 2 the re-ordering is the identity, at 4 its own inverse), query
heads that are neither the kv heads nor their square, and values of its own for every tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llamaconv.model.config_json import to_config
from llamaconv.model.names import every_role
from llamaconv.model.params import LlamaParams

GQA = LlamaParams(
    dim=64,
    n_layers=12,
    n_heads=8,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=96,
    vocab_size=80,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=128,
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 80,
}

Edit = Callable[[dict[str, Tensor]], Any]


def tensors(params: LlamaParams = GQA, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Every tensor of a Llama under Hugging Face's names, each of other random values."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for role, layer in every_role(params):
        name = role.in_naming("huggingface", layer)
        assert name is not None
        values = torch.randn(role.shape(params), generator=generator, dtype=torch.float32)
        made[name] = (values * 0.3 + (1 if values.ndim == 1 else 0)).to(dtype)
    return made


def write(
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 3,
    **changes: Any,
) -> Path:
    """A Hugging Face folder; ``changes`` go into its config.json, None takes an entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(weights if weights is not None else tensors())
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, weights, shards)
    entries = {**(config if config is not None else CONFIG), **changes}
    entries = {name: value for name, value in entries.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def write_model(folder: Path, params: LlamaParams, **changes: Any) -> Path:
    """`write` for a whole model: its tensors, and a config.json that says the same."""
    return write(folder, tensors(params), to_config(params, None), **changes)


def write_shards(folder: Path, weights: Mapping[str, Tensor], shards: int) -> None:
    """Tensors dealt out one by one, so that q, k and v of a layer lie in different files."""
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: weights[name] for name in list(weights)[number::shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Reads, lets ``edit`` change, and writes a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def write_holes(folder: Path, params: LlamaParams, shards: int) -> Path:
    """A Hugging Face folder of any size on no disk: true headers, and holes for the weights."""
    folder.mkdir(parents=True)
    named = [(role.in_naming("huggingface", layer), role) for role, layer in every_role(params)]
    weight_map, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name, role in named[
            number * len(named) // shards : (number + 1) * len(named) // shards
        ]:
            shape = list(role.shape(params))
            begin, end = end, end + 2 * prod(shape)
            header[str(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_config(params, "bfloat16")))
    return folder
