"""Files of torch.save as trainers write them: parameters, nested dicts, views, and other values beside."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from support.archives import saved
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.model.config_json import to_config
from llamaconv.verify import inert_pickle

SMALL = replace(checkpoints.GQA, n_layers=1)
Q = "model.layers.0.self_attn.q_proj.weight"
Weights = dict[str, Tensor]


class Scheduler(enum.Enum):
    """As in transformers' TrainingArguments."""

    LINEAR = "linear"


@dataclass
class Options:
    """Options of a trainer, of a class that nobody else has."""

    lr: float = 0.1
    scheduler: Scheduler = Scheduler.LINEAR


def with_attribute(weight: Tensor) -> Tensor:
    """As Megatron marks its parameters."""
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    return weight


def of_one_storage(weights: Weights) -> Weights:
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    parts = flat.split([weight.numel() for weight in weights.values()])
    return {n: part.view(w.shape) for part, (n, w) in zip(parts, weights.items(), strict=True)}


def ordered(weights: Weights) -> Any:
    state = collections.OrderedDict(weights)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return state


def beside(**others: Any) -> Callable[[Weights], Any]:
    return lambda weights: {"model": weights, **others}


def numpy_scalar() -> Any:
    import numpy as np

    return {"loss": np.float64(0.5), "rng": np.arange(3)}


def defaulted(weights: Weights) -> Any:
    state: Any = collections.defaultdict(list)
    state.update(weights)
    return {"state_dict": state}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": 1}}, "param_groups": [{"lr": 0.1}]}

FORMS: dict[str, Callable[[Weights], Any]] = {
    "parameters": lambda w: {n: torch.nn.Parameter(t) for n, t in w.items()},
    "parameters with attributes": lambda w: {
        n: with_attribute(torch.nn.Parameter(t)) for n, t in w.items()
    },
    "tensors with attributes": lambda w: {n: with_attribute(t.clone()) for n, t in w.items()},
    "OrderedDict with _metadata": ordered,
    "transposed": lambda w: {n: t.t().contiguous().t() for n, t in w.items()},
    "columns of wider tensors": lambda w: {
        n: torch.cat([t, t + 1], -1)[..., : t.shape[-1]] for n, t in w.items()
    },
    "every second element": lambda w: {
        n: torch.stack([t, t + 1], -1)[..., 0] for n, t in w.items()
    },
    "every second row of a transposed one": lambda w: {
        n: torch.stack([t.t(), t.t() + 1], -1)[..., 0].t() if t.ndim == 2 else t
        for n, t in w.items()
    },
    "one storage": of_one_storage,
    "in model, with an optimizer": beside(optimizer=OPTIMIZER, epoch=3, best=None),
    "in state_dict": lambda w: {"state_dict": w, "callbacks": {}},
    "in model of state": lambda w: {"state": {"model": w}, "step": 7},
    "with an average": lambda w: {"ema": {n: t * 2 for n, t in w.items()}, "model": w},
    "with a Namespace": beside(args=argparse.Namespace(lr=0.1, path=Path("x"))),
    "with numpy's values": beside(state=numpy_scalar()),
    "with options of a class": beside(options=Options()),
    "in a defaultdict": defaulted,
    "with TransformerEngine's state": lambda w: {
        **w,
        **{n.replace("weight", "_extra_state"): io.BytesIO(b"state") for n in w},
    },
    "with bytes": beside(rng=b"state", key=b""),
    "with counters": lambda w: {**w, "epoch": 3, "name": "run"},
}


def write(folder: Path, state: Any, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_config(SMALL, None)))
    torch.save(state, folder / name)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_form_of_torch_save_is_converted_and_checked(tmp_path: Path, form: str) -> None:
    weights = checkpoints.tensors(SMALL)
    folder = write(tmp_path / "bin", FORMS[form](dict(weights)))
    plan = make_plan(open_checkpoint(folder), Target(to="hf"))
    done = convert_checkpoint(plan, tmp_path / "hf")
    assert done.verification
    assert done.verification.ok
    found = load_file(done.target / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_entries_that_are_left_out_are_named_once(tmp_path: Path) -> None:
    state = {"state_dict": checkpoints.tensors(SMALL), "optimizer": OPTIMIZER, "epoch": 3}
    (said,) = open_checkpoint(write(tmp_path / "bin", state)).problems
    assert said.level == "warning"
    assert "state_dict" in said.message
    assert "optimizer, epoch" in said.message


@pytest.mark.parametrize("n_files", [1, 2])
def test_transposed_parts_of_meta_are_joined(tmp_path: Path, n_files: int) -> None:
    """Views of `torch.chunk`, which torch.save does not copy."""
    source = checkpoints.write_model(tmp_path / "source", SMALL)
    plan = make_plan(open_checkpoint(source), Target(to="meta"))
    whole = torch.load(
        convert_checkpoint(plan, tmp_path / "one", verified=False).target / "consolidated.00.pth"
    )
    folder = tmp_path / "meta"
    folder.mkdir()
    for number in range(n_files):
        state = {
            name: weight.chunk(n_files, 1 if name.split(".")[-2] in ("wo", "w2") else 0)[number]
            if weight.ndim == 2
            else weight
            for name, weight in whole.items()
        }
        state = {"model": {n: torch.nn.Parameter(t) for n, t in state.items()}}
        torch.save(state, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text((tmp_path / "one" / "params.json").read_text())
    plan = make_plan(open_checkpoint(folder), Target(to="hf", assets=str(source)))
    done = convert_checkpoint(plan, tmp_path / "hf")
    assert done.verification
    assert done.verification.ok
    found = load_file(done.target / "model.safetensors")
    assert all(torch.equal(found[n], w) for n, w in checkpoints.tensors(SMALL).items())


def test_expanded_tensor_is_refused(tmp_path: Path) -> None:
    """It has one row for any number of rows, so that its size would mean nothing."""
    weights = checkpoints.tensors(SMALL)
    weights[Q] = weights[Q][:1].expand(64, 64)
    (error,) = open_checkpoint(write(tmp_path / "bin", weights)).errors
    assert Q in error.message
    assert ".contiguous()" in error.message


def test_whole_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (error,) = make_plan(open_checkpoint(write(tmp_path / "bin", torch.nn.Linear(2, 2)))).errors
    assert "torch.nn.modules.linear.Linear" in error.message
    assert "state_dict()" in error.message


def test_tensors_of_one_rank_are_refused_with_the_remedy(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = checkpoints.tensors(SMALL).items()
        state = {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in weights}
        folder = write(tmp_path / "bin", state)
    finally:
        distributed.destroy_process_group()
    (error,) = make_plan(open_checkpoint(folder)).errors
    assert str(folder / "pytorch_model.bin") in error.message
    assert "DTensor" in error.message
    assert "full_state_dict=True" in error.message


def test_class_of_nobody_here_is_read_and_never_imported(tmp_path: Path) -> None:
    """The options are of a class whose module exists on the trainer's machine only."""
    folder = write(tmp_path / "bin", {"model": checkpoints.tensors(SMALL), "options": Options()})
    path = folder / "pytorch_model.bin"
    elsewhere = io.BytesIO()
    name = Options.__module__.encode()
    with zipfile.ZipFile(path) as read, zipfile.ZipFile(elsewhere, "w") as made:
        for entry in read.namelist():
            made.writestr(entry, read.read(entry).replace(name, b"x" * len(name)))
    path.write_bytes(elsewhere.getvalue())
    done = convert_checkpoint(make_plan(open_checkpoint(folder)), tmp_path / "dcp")
    assert done.verification
    assert done.verification.ok


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.",
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
        pickle.dumps(Options),
    ],
)
def test_unpickler_of_the_checks_builds_tensors_only(payload: bytes) -> None:
    value = inert_pickle.Unpickler(io.BytesIO(payload)).load()
    assert value is inert_pickle.Inert or type(value) is inert_pickle.Inert


def test_unpickler_of_the_checks_reads_what_torch_reads() -> None:
    state = {"a": torch.nn.Parameter(torch.ones(2)), "b": {"c": torch.zeros(3).to(torch.uint16)}}
    file = io.BytesIO(saved(state))
    found = torch.load(file, weights_only=False, pickle_module=inert_pickle)
    assert torch.equal(found["a"], torch.ones(2))
    assert found["b"]["c"].dtype == torch.uint16
