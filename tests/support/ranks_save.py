"""Run by torchrun on four gloo ranks: saves one model's tensors as DTensors of every cut.

    torchrun --nproc-per-node 4 ranks_save.py WEIGHTS FOLDER

WEIGHTS is a file of torch.save, {"titan-0.3": tensors, "titan-main": …, …}. FOLDER gets
a DCP a kind of placement, and what torch's HuggingFaceStorageWriter saves of the same.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks_exit import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main() -> None:
    dist.init_process_group("gloo")
    namings = torch.load(sys.argv[1], weights_only=True)
    folder = Path(sys.argv[2])
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2))
    kinds = {
        "fsdp": (flat, lambda ndim: [Shard(0)]),
        "tp": (flat, lambda ndim: [Shard(1) if ndim == 2 else Replicate()]),
        "2d": (square, lambda ndim: [Shard(0), Shard(1) if ndim == 2 else Replicate()]),
        # Of w13, which has three axes, FSDP cuts the second; the others cut boxes out of it.
        "main-fsdp": (flat, lambda ndim: [Shard(1 if ndim == 3 else 0)]),
        "main-first": (flat, lambda _: [Shard(0)]),
        "main-tp": (flat, lambda ndim: [Shard(ndim - 1)]),
        "main-2d": (square, lambda ndim: [Shard(max(ndim - 2, 0)), Shard(ndim - 1)]),
        "main-3d": (square, lambda ndim: [Shard(0), Shard(ndim - 1)]),
    }

    def cut(naming, kind):
        mesh, place = kinds[kind]
        return {
            name: distribute_tensor(weight, mesh, place(weight.ndim))
            for name, weight in namings[naming].items()
        }

    for kind in kinds:
        if kind.startswith("main-"):
            dcp.save(cut("titan-main", kind), checkpoint_id=folder / kind)
            continue
        state = cut("titan-0.3", kind)
        optimizer = {f"state.{name}.exp_avg": tensor for name, tensor in state.items()}
        trainer = {"optimizer": optimizer, "train_state": {"step": 7}, "lr_scheduler": {"last": 1}}
        dcp.save({**state, **trainer}, checkpoint_id=folder / kind)
        writer = dcp.HuggingFaceStorageWriter(folder / f"hf-{kind}", save_distributed=True)
        dcp.save(cut("huggingface", kind), storage_writer=writer)
    for kind in ("fsdp", "2d"):
        dcp.save(cut("fused", kind), checkpoint_id=folder / f"fused-{kind}")
    dcp.save(cut("huggingface", "fsdp"), checkpoint_id=folder / "hf-names")
    writer = dcp.HuggingFaceStorageWriter(
        folder / "hf-consolidated", save_distributed=True, enable_consolidation=True
    )
    dcp.save(cut("huggingface", "fsdp"), storage_writer=writer)
    leave()


if __name__ == "__main__":
    main()
