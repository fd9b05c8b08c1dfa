"""What a folder holds, by other people's readers: tensors of a DCP, of a Hugging Face folder."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamaconv import open_checkpoint
from llamaconv.model.params import LlamaParams


def load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP through torch's own reader, with the dtypes that are stored."""
    from torch.distributed.checkpoint import FileSystemReader, load

    metadata = FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        load(state, checkpoint_id=folder, no_dist=True)
    return state


def tensors_of(folder: Path) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        named |= load_file(file)
    return named


def assert_same_folder(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert open_checkpoint(one).params == open_checkpoint(other).params


def fused(weights: dict[str, Tensor], params: LlamaParams) -> dict[str, Tensor]:
    """wq, wk and wv as TorchTitan's FusedQKVLinear merges them (models/common/attention.py)."""
    made = dict(weights)
    heads, kv, size = params.n_heads, params.n_kv_heads, params.head_dim
    for layer in range(params.n_layers):
        start = f"layers.{layer}.attention.qkv_linear."
        q, k, v = (made.pop(f"{start}{name}.weight") for name in ("wq", "wk", "wv"))
        groups = [
            q.view(kv, heads // kv, size, -1),
            k.view(kv, 1, size, -1),
            v.view(kv, 1, size, -1),
        ]
        made[f"{start}wqkv.weight"] = torch.cat(groups, dim=1).reshape(-1, params.dim)
    return made


def apart(weights: dict[str, Tensor], params: LlamaParams) -> dict[str, Tensor]:
    """A state with the roles of `of_main` apart, named as llamaconv names rows of fused tensors."""
    made = {}
    for name, tensor in weights.items():
        parts = {}
        if name.endswith("wqkv.weight"):
            groups = tensor.reshape(params.n_kv_heads, -1, params.head_dim, tensor.shape[-1])
            parts = {"wq": groups[:, :-2], "wk": groups[:, -2], "wv": groups[:, -1]}
            parts = {role: part.reshape(-1, tensor.shape[-1]) for role, part in parts.items()}
        elif name.endswith("w13.weight"):
            parts = {"w1": tensor[0], "w3": tensor[1]}
        made |= {f"{name}[{role}]": part for role, part in parts.items()} or {name: tensor}
    return made


def of_main(weights: dict[str, Tensor], params: LlamaParams) -> dict[str, Tensor]:
    """What titan-main stores of a titan-0.3 state: wqkv, and w1 and w3 stacked."""
    made = fused(weights, params)
    for layer in range(params.n_layers):
        start = f"layers.{layer}.feed_forward."
        pair = [made.pop(f"{start}{name}.weight") for name in ("w1", "w3")]
        made[f"{start}w13.weight"] = torch.stack(pair)
    return made


def to_version_1(folder: Path) -> None:
    """Gives torch_checkpointing's ``metadata.pkl`` the form of version 1.0, which nothing writes now.

    As torch_checkpointing reads it (distributed_metadata.py, `_convert_v1_to_v2`): tensors by a path
    that begins with their item, and the files of all items by rank.
    """
    path = folder / "metadata.pkl"
    now = pickle.loads(path.read_bytes())
    items = now["metadata"]
    before = {
        "metadata": {
            json.dumps([item, *json.loads(text)], separators=(",", ":")): groups
            for item, entry in items.items()
            for text, groups in entry["nested_path_to_metadata"].items()
        },
        "rank_to_layout_info_mappings": {
            rank: {item: entry["rank_to_layout_info"][rank] for item, entry in items.items()}
            for rank in range(now["world_size"])
        },
        "world_size": now["world_size"],
        "version": "1.0",
    }
    path.write_bytes(pickle.dumps(before))
