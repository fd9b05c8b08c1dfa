"""Full checkpoints of a training run, as each TorchTitan release saves them, by torch's own optimizer.

The idea: the same run in every form. Each form has its own parameters, which a real AdamW steps with
the same gradients, fused or apart; AdamW works element by element, so what one form holds is what any
conversion to it must give, to the bit. torch flattens the optimizer and saves it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from llamaconv.model.names import every_role
from llamaconv.model.params import LlamaParams
from support import checkpoints
from support.folders import fused, of_main

PARAMS = replace(checkpoints.GQA, n_layers=2)
Weights = dict[str, Tensor]
# What 0.2.2 saved of its scheduler with torch 2.13.
_OF_0_2 = ("base_lrs", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr")

# What each form's model stores, and what its optimizer's parameters are, from titan-0.3's names.
FORMS: dict[str, tuple[Callable[..., Weights], Callable[..., Weights]]] = {}


def _older(weights: Weights, _params: LlamaParams) -> Weights:
    return {
        name.replace("qkv_linear.", "").replace("lm_head", "output"): one
        for name, one in weights.items()
    }


def _as_it_is(weights: Weights, _params: LlamaParams) -> Weights:
    return weights


FORMS["titan-0.2"] = _older, _older
FORMS["titan-0.3"] = _as_it_is, fused
FORMS["titan-0.3 split"] = _as_it_is, _as_it_is
FORMS["titan-main"] = of_main, of_main


def values(seed: int, params: LlamaParams = PARAMS) -> Weights:
    """Random values for each tensor of a model, under titan-0.3's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        str(role.in_naming("titan-0.3", layer)): torch.randn(
            role.shape(params), generator=generator
        )
        for role, layer in every_role(params)
    }


def module(weights: Weights) -> nn.Module:
    """A module whose parameters have these names."""
    top = nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        inner = top
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(last, nn.Parameter(value.clone()))
    return top


def _rate(first: float, step: int) -> float:
    return first / (1 + step)


def state(
    form: str, params: LlamaParams = PARAMS, *, amsgrad: bool = False, tied: bool = False
) -> dict[str, Any]:
    """What a run of ``form`` saves after two steps."""
    of_model, of_optimizer = FORMS[form]
    weights, head = values(1, params), "lm_head.weight"
    if tied:
        weights[head] = weights["tok_embeddings.weight"]

    def trained(these: Weights) -> Weights:
        return {name: one for name, one in these.items() if not (tied and name == head)}

    model = module(trained(of_optimizer(weights, params)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=amsgrad)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, 1))
    for step in range(2):
        gradients = of_optimizer(values(10 + step, params), params)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        scheduler.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        **of_model(weights, params),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        # 0.2.2 saves all of it, 0.3.0 the number of steps alone.
        "lr_scheduler": {
            name: value
            for name, value in scheduler.state_dict().items()
            if name == "last_epoch" or (form == "titan-0.2" and name in _OF_0_2)
        },
        "train_state": {"step": 2, "ntokens_seen": 4096},
        "dataloader": {"dp_rank_0": b"\x80\x04opaque", "world_size": 1},
    }


def write(folder: Path, state: dict[str, Any]) -> Path:
    """Save a run's state with torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        save(state, checkpoint_id=folder, no_dist=True)
    return folder


def entries(folder: Path) -> dict[str, Any]:
    """Everything in a DCP, through torch's own reader; what is not a tensor is unpickled."""
    metadata = FileSystemReader(folder).read_metadata()
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        load(found, checkpoint_id=folder, no_dist=True)
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both have the same entries, to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype, name
            assert value.shape == other[name].shape, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
