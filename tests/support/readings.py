"""What a folder means, read by other people's readers and by ``json``: nothing of llamaconv's.

Tests that damage folders ask it whether the damage changed anything at all: two folders mean the
same where their readings are equal. A reader that gives up means something else, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from support.folders import load_dcp

Reading = dict[str, Any]

# What a receipt tells of the past, which nobody could find out from source and target; and the
# options that say only how a target was cut into files, which its files say themselves.
_PAST = ("created", "versions", "verified")
_PAST_OF_SOURCE = ("path", "assets", "files")
_CUT = ("shards", "max_shard_size", "assets")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor; of Meta's files each part, under its file's number and its name."""
    if (folder / ".metadata").exists():
        return load_dcp(folder)
    if any(folder.glob("consolidated.*.pth")):
        return parts(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return held(folder / "model.safetensors")
    return indexed(index, held)


def parts(folder: Path) -> dict[str, Tensor]:
    """Of Meta's files each part, under its file's name and its own."""
    return {
        f"{file.name} {name}": part
        for file in sorted(folder.glob("consolidated.*.pth"))
        for name, part in torch.load(file, weights_only=True).items()
    }


def joined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parts` of matrices put together: columns of wo and w2, rows of the others."""
    cut: dict[str, list[Tensor]] = {}
    for name, part in sorted(parts.items()):
        cut.setdefault(name.split(" ", 1)[1], []).append(part)
    return {
        name: torch.cat(found, 1 if name.split(".")[-2] in ("wo", "w2") else 0)
        if found[0].ndim == 2
        else found[0]
        for name, found in cut.items()
    }


def indexed(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What an index names; a tensor that is in a file but not in the index is not loaded."""
    weight_map = json.loads(index.read_bytes())["weight_map"]
    files = {file: read(index.parent / file) for file in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}


def held(path: Path) -> dict[str, Tensor]:
    """Every tensor of one ``.safetensors`` file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """dtype, shape and bytes: what makes two tensors the same to the bit."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), raw.numpy().tobytes()


def weights(folder: Path) -> Reading:
    """`tensors` as `bits`."""
    return {name: bits(tensor) for name, tensor in tensors(folder).items()}


def words(folder: Path) -> Reading:
    """What the JSON beside the weights says of the model; config.json as transformers takes it."""
    said = {}
    if (folder / "config.json").exists():
        entries = json.loads((folder / "config.json").read_bytes())
        known = LlamaConfig().to_dict().keys()
        said |= {k: v for k, v in LlamaConfig(**entries).to_dict().items() if k in known}
    if (folder / "params.json").exists():
        said |= json.loads((folder / "params.json").read_bytes())
    return said


def receipt(folder: Path) -> Reading:
    """What the receipt says that can be held against source and target; nothing where it is gone."""
    if not (folder / "llamaconv.json").exists():
        return {}
    entries = json.loads((folder / "llamaconv.json").read_bytes())
    for name in _PAST:
        del entries[name]
    for name in _PAST_OF_SOURCE:
        del entries["source"][name]
    for name in _CUT:
        del entries["target"][name]
    # Receipts of earlier versions lack these.
    entries["params"].setdefault("family", "llama")
    entries["params"].setdefault("rope_entry", "")
    target = entries["target"]
    if target["to"] != "dcp":
        # Only a DCP leaves a choice.
        del target["generation"], target["rope"]
    if not entries["params"]["tied"] and target["tie"] == "untie":
        target["tie"] = "auto"
    if {entry["dtype"] for entry in entries["tensors"]} == {target["dtype"]}:
        target["dtype"] = "keep"
    for entry in entries["dropped"]:
        del entry["reason"]
    return dict(entries)


def same(read: Any, one: Path, other: Path) -> bool:
    """Whether ``read`` gives the same for both; ``one`` is the good one and has to be readable."""
    good = read(one)
    try:
        return bool(read(other) == good)
    except Exception:  # whatever a reader of damaged bytes raises, it did not read them
        return False
    except BaseException as error:
        # torch.distributed.checkpoint's own is no Exception.
        if type(error).__name__ == "CheckpointException":
            return False
        raise
