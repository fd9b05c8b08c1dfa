"""Run by torchrun on four gloo ranks: saves training runs cut over the ranks as FSDP cuts.

    torchrun --nproc-per-node 4 ranks_run.py STATES FOLDER

STATES is a file of torch.save, {form: state} as `support.runs.state` makes them. FOLDER gets a DCP a
form; each rank adds the position of its own data loader.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks_exit import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (4,))

    def cut(value):
        if isinstance(value, dict):
            return {name: cut(one) for name, one in value.items()}
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        # FSDP cuts w13, which has three axes, along the second.
        return distribute_tensor(value, mesh, [Shard(1 if value.ndim == 3 else 0)])

    for form, state in torch.load(sys.argv[1], weights_only=True).items():
        state = cut(state)
        rank = dist.get_rank()
        state["dataloader"] = {f"dp_rank_{rank}": f"of {rank}".encode(), "world_size": 4}
        dcp.save(state, checkpoint_id=Path(sys.argv[2]) / form)
    leave()


if __name__ == "__main__":
    main()
