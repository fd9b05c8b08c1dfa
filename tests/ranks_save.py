"""Run by torchrun on four gloo ranks: saves one model's tensors as DTensors of every cut.

    torchrun --nproc-per-node 4 ranks_save.py WEIGHTS FOLDER

WEIGHTS is a file of torch.save, a dict of tensors. FOLDER gets a DCP a kind of placement.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main() -> None:
    dist.init_process_group("gloo")
    weights = torch.load(sys.argv[1], weights_only=True)
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2))
    kinds = {
        "fsdp": (flat, lambda ndim: [Shard(0)]),
        "tp": (flat, lambda ndim: [Shard(1) if ndim == 2 else Replicate()]),
        "2d": (square, lambda ndim: [Shard(0), Shard(1) if ndim == 2 else Replicate()]),
    }
    for kind, (mesh, place) in kinds.items():
        state = {
            name: distribute_tensor(weight, mesh, place(weight.ndim))
            for name, weight in weights.items()
        }
        optimizer = {f"state.{name}.exp_avg": tensor for name, tensor in state.items()}
        trainer = {"optimizer": optimizer, "train_state": {"step": 7}, "lr_scheduler": {"last": 1}}
        dcp.save({**state, **trainer}, checkpoint_id=Path(sys.argv[2]) / kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
