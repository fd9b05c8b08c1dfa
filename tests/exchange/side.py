"""Run by each Python of `test_exchange`: write checkpoints, or read those of another torch.

    python side.py save SAMPLE.pt FOLDER    # by torch alone: whole, sharded, with an optimizer
    python side.py load SAMPLE.pt FOLDER    # by torch alone, and compare every tensor

SAMPLE.pt holds the tensors by TorchTitan's names, as torch saves them: an environment of TorchTitan
need not have safetensors.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

RANKS = 2


def save(weights: dict[str, Tensor], folder: Path) -> None:
    """Each checkpoint gets a ``Path``, which torch keeps in its metadata."""
    dcp.save(dict(weights), checkpoint_id=folder / "whole", no_dist=True)
    moments = {
        name: {"exp_avg": torch.zeros_like(one), "step": torch.tensor(3.0)}
        for name, one in weights.items()
    }
    trainer: dict[str, Any] = {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": 3},
    }
    dcp.save(weights | trainer, checkpoint_id=folder / "trainer", no_dist=True)
    torch.multiprocessing.spawn(save_sharded, (weights, folder / "sharded"), nprocs=RANKS)


def save_sharded(rank: int, weights: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.FileStore(str(folder.parent / "store"), RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store)
    mesh = init_device_mesh("cpu", (RANKS,))
    shards = {
        name: distribute_tensor(one, mesh, [Shard(one.ndim - 1)]) for name, one in weights.items()
    }
    dcp.save(shards, checkpoint_id=folder)
    dist.destroy_process_group()


def load(weights: dict[str, Tensor], folder: Path) -> None:
    found = {name: torch.full_like(one, torch.nan) for name, one in weights.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    different = [name for name, one in weights.items() if not torch.equal(one, found[name])]
    assert not different, different


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    mode, sample, target = sys.argv[1:]
    {"save": save, "load": load}[mode](torch.load(sample, weights_only=True), Path(target))
    print(f"{mode}: torch {torch.__version__}, Python {sys.version.split()[0]}")
