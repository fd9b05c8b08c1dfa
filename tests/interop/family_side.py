"""What TorchTitan's own state-dict adapters and flavours say: `python family_side.py MODE JOB.json`.

Runs inside the environment of TorchTitan 0.3.0. The idea: the adapter of a model, which reads Hugging
Face's names for TorchTitan, is given the same tensors as llamaconv. The limit: adapters rename and reorder
in memory; nothing is trained.

A job is a JSON object. `adapter`: `runs`, each with `name`, `folder` and `words` (see advice_side.py),
`dcp` and `tensors` (a file of torch.save, Hugging Face's names); `out` gets, for each, the names that only
one side has, and those whose bits differ, there and back. `flavours`: `module`; `out` gets the parameters
of each of its configurations and flavours.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from advice_side import enter
from titan_side import alone
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def adapter(job: dict[str, Any]) -> None:
    """Compares each DCP with what the adapter of its model makes of the source, and the reverse."""
    torch.save({run["name"]: _adapted(run) for run in job["runs"]}, job["out"])


def _adapted(run: dict[str, Any]) -> dict[str, list[str]]:
    from torchtitan.config import ConfigManager

    enter(run["folder"])
    spec = ConfigManager().parse_args(run["words"]).model_spec
    its = spec.state_dict_adapter(spec.model, None)
    source, written = torch.load(run["tensors"], weights_only=True), read(run["dcp"])
    there = its.from_hf(dict(source))
    if spec.model.enable_weight_tying:
        # Its own loader leaves the head to the embedding; a DCP of 0.3.0 has both.
        there.setdefault("lm_head.weight", there["tok_embeddings.weight"])
    back = its.to_hf(dict(written))
    return {
        "apart": sorted((there.keys() ^ written.keys()) | (back.keys() ^ source.keys())),
        "different": _different(there, written) + _different(back, source),
        "compared": sorted(there.keys() & written.keys()),
    }


def _different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]


def read(checkpoint: str) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP, by torch's own loader."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def flavours(job: dict[str, Any]) -> None:
    """Describes the dense flavours of a module, and says which have a configuration of their name."""
    package = importlib.import_module(f"torchtitan.models.{job['module']}")
    registry = importlib.import_module(f"torchtitan.models.{job['module']}.config_registry")
    found = {}
    for name, build in getattr(package, f"{job['module']}_configs").items():
        model = build(attn_backend="flex")
        layer = model.layers[0]
        if layer.feed_forward is None:
            continue
        chosen = f"{job['module']}_{name.lower().replace('.', '_')}"
        attention = layer.attention
        found[name] = {
            "dim": model.dim,
            "n_layers": len(model.layers),
            "n_heads": attention.n_heads,
            "n_kv_heads": attention.n_kv_heads or attention.n_heads,
            "head_dim": attention.head_dim or model.dim // attention.n_heads,
            "ffn_dim": layer.feed_forward.w1.out_features,
            "vocab_size": model.vocab_size,
            "norm_eps": model.norm.eps,
            "rope_theta": attention.rope.theta,
            "tied": model.enable_weight_tying,
            "scaling": attention.rope.scaling,
            "rope": type(attention.rope).__qualname__.split(".")[0],
            "has_configuration": hasattr(registry, chosen),
        }
    torch.save(found, job["out"])


if __name__ == "__main__":
    alone()
    mode, path = sys.argv[1:]
    {"adapter": adapter, "flavours": flavours}[mode](json.loads(Path(path).read_text()))
