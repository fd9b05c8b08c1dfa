"""Saves and loads checkpoints with torch_checkpointing itself; runs in an environment that has it.

    python store_side.py save JOB.json      # 1 and 4 gloo ranks, a folder for each of `KINDS`
    python store_side.py load JOB.json      # each folder by the package's own loader, on one rank

JOB has "weights" (a file of torch.save, {"titan-0.3": tensors, "titan-main": …}), "home" (the folder of
the folders), "kinds" (which of `KINDS`, all by default) and "out".

The package exchanges metadata between ranks through CUDA alone (0.1.1, `_all_gather_pickled_data`), so
here gloo carries the same objects. All else is the package's own.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch_checkpointing import CheckpointManager
from torch_checkpointing.barriers import TCPStoreBarrierConfig
from torch_checkpointing.checkpoint_layout import LayoutInfo, SafetensorsSerialization
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.metadata_manager import DefaultMetadataManager
from torch_checkpointing.schema import ItemSpec
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig


def rows(_):
    return [Shard(0)]


def columns(ndim):
    return [Shard(ndim - 1)]


def main_rows(ndim):
    """As FSDP cuts titan-main: w13, which has three axes, along its second."""
    return [Shard(1 if ndim == 3 else 0)]


def boxes(ndim):
    return [Shard(max(ndim - 2, 0)), Shard(ndim - 1)] if ndim > 1 else [Replicate(), Shard(0)]


def copies(ndim):
    """As HSDP: two groups that hold the same."""
    return [Replicate(), *rows(ndim)]


def strided(ndim):
    """As FSDP on top of tensor parallelism: its cut comes after the one to its right."""
    axis = 1 if ndim == 3 else 0
    return [_StridedShard(axis, split_factor=2), Shard(axis)]


def scattered(_):
    """A strided cut after the others, which leaves each rank two runs of rows."""
    return [Shard(0), _StridedShard(0, split_factor=2)]


# By folder: ranks, whether of safetensors, the naming, the mesh, and how each tensor is placed in it;
# None for a module of `fully_shard`, saved in the background as TorchTitan does while it trains.
KINDS = {
    "one": (1, False, "titan-0.3", (1,), rows),
    "one-st": (1, True, "titan-main", (1,), main_rows),
    "fsdp": (4, False, "titan-0.3", (4,), rows),
    "fsdp-st": (4, True, "titan-0.3", (4,), rows),
    "main": (4, False, "titan-main", (4,), main_rows),
    "main-2d-st": (4, True, "titan-main", (2, 2), boxes),
    "columns": (4, False, "titan-0.3", (4,), columns),
    "copies": (4, False, "huggingface", (2, 2), copies),
    "strided": (4, False, "titan-main", (2, 2), strided),
    "background": (4, False, "titan-0.3", (4,), None),
    "scattered-st": (4, True, "titan-main", (2, 2), scattered),
}


def gathered(self, data, process_group=None):
    found = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, data, group=process_group)
    return dict(enumerate(found))


DefaultMetadataManager._all_gather_pickled_data = gathered


def sharded(weights, mesh):
    """The state of a module with these parameters, as FSDP2 holds them."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        inside = root
        for part in path:
            if not hasattr(inside, part):
                inside.add_module(part, nn.Module())
            inside = getattr(inside, part)
        inside.register_parameter(leaf, nn.Parameter(weight.clone()))
    for layer in root.layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return root.state_dict()


def in_background(port):
    """A saver that copies the state and lets another process write it, which needs no CUDA."""
    barrier = TCPStoreBarrierConfig(
        master_address="localhost",
        tcpstore_port=port,
        timeout_barrier_init_sec=60,
        use_checkpoint_barrier_tcpstore_libuv=True,
    )
    return AsyncCheckpointSaverConfig(
        staging_config=CheckpointStagerConfig(use_pinned_memory=False),
        writer_config=CheckpointWriterConfig(barrier_config=barrier),
    )


def manager(is_safetensors=False, save=None):
    layout = None
    if is_safetensors:
        layout = LayoutInfo("model_{rank}.safetensors", SafetensorsSerialization())
    # As TorchTitan configures it (components/checkpointer/torch_checkpointing.py): the model and the
    # optimizer have a resharder, everything else has none.
    return CheckpointManager.Config(
        items={
            "model": ItemSpec(layout=layout, resharder=DefaultResharder(), required=False),
            "optimizer": ItemSpec(resharder=DefaultResharder(), required=False),
        },
        save=save or SyncCheckpointSaverConfig(),
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()


def save_rank(rank, n_ranks, store, job):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n_ranks)
    namings = torch.load(job["weights"], weights_only=True)
    meshes = {
        shape: init_device_mesh("cpu", shape) for shape in ((n_ranks,), (2, 2)[: n_ranks // 2])
    }
    for kind in job["kinds"]:
        ranks, is_safetensors, naming, mesh, place = KINDS[kind]
        if ranks != n_ranks:
            continue
        if place is None:
            model = sharded(namings[naming], meshes[mesh])
        else:
            model = {
                name: distribute_tensor(
                    weight, meshes[mesh], place(weight.ndim), src_data_rank=None
                )
                for name, weight in namings[naming].items()
            }
        name = "norm.weight" if "norm.weight" in model else "model.norm.weight"
        trainer = {
            "optimizer": {
                f"state.{name}.exp_avg": model[name].clone(),
                f"state.{name}.step": torch.tensor(3.0),
                f"param_groups.{name}.lr": 0.1,
            },
            "train_state": {"step": torch.tensor(3), "ntokens_seen": 77},
            "lr_scheduler": {"last_epoch": 3},
        }
        one = manager(is_safetensors, in_background(job["port"]) if place is None else None)
        writing = one.save(str(Path(job["home"]) / kind), {"model": model, **trainer})
        if writing is not None:
            writing.result(timeout=120)
        one.close()
    dist.barrier()
    dist.destroy_process_group()


def save(job):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job["port"] = free.getsockname()[1]
    for n_ranks in sorted({KINDS[kind][0] for kind in job["kinds"]}):
        store = f"{job['out']}.store{n_ranks}"
        mp.spawn(save_rank, (n_ranks, store, job), nprocs=n_ranks)
    return {}


def load(job):
    """The tensors of each folder, whole, by the package's own loader."""
    namings = torch.load(job["weights"], weights_only=True)
    found = {}
    for kind, folder in job["folders"].items():
        weights = namings[job["namings"][kind]]
        into = {name: torch.full_like(weight, 7) for name, weight in weights.items()}
        one = manager()
        found[kind] = dict(one.load(folder, into={"model": into}, strict=True)["model"])
        one.close()
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[2]).read_text())
    job.setdefault("kinds", list(KINDS))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.save({"save": save, "load": load}[sys.argv[1]](job), job["out"])
