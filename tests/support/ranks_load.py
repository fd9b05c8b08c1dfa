"""Run by torchrun on gloo ranks: loads checkpoints and says what each rank read for it.

    torchrun --nproc-per-node N ranks_load.py JOB OUT

JOB is a JSON file: `weights`, a file of torch.save with the tensors that are expected, and `loads`, pairs
of a folder and of how it is held: `rows` (DTensors of `Shard(0)`) or `fsdp` (`fully_shard`). OUT gets,
a load, the sum over the ranks of the bytes read, and the names whose values differ on any rank.

A rank counts what it asks the system to read (`rchar` of /proc/self/io), cached or not.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks_exit import leave
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, empty


class Node(nn.Module):
    """A module that has the parameters and children that dotted names ask for."""

    def hold(self, path: list[str], weight: torch.Tensor) -> None:
        first, *rest = path
        if not rest:
            self.register_parameter(first, nn.Parameter(torch.zeros_like(weight)))
            return
        if first not in self._modules:
            self.add_module(first, Node())
        child = self.get_submodule(first)
        assert isinstance(child, Node)
        child.hold(rest, weight)


def rows(weights: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    return {
        name: empty(weight.shape, dtype=weight.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, weight in weights.items()
    }


def fsdp(weights: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    """The state of a module that FSDP2 shards, a layer at a time as trainers do it."""
    model = Node()
    for name, weight in weights.items():
        model.hold(name.split("."), weight)
    layers = model.get_submodule("layers")
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return dict(model.state_dict())


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def load(folder: str, held: str, weights: dict[str, torch.Tensor], mesh: DeviceMesh) -> list:
    state = {"rows": rows, "fsdp": fsdp}[held](weights, mesh)
    before = bytes_read()
    dcp.load(state, checkpoint_id=folder)
    read = bytes_read() - before
    differ = [name for name, weight in weights.items() if not equal(state[name], weight)]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (read, differ))
    return [sum(one for one, _ in everyone), sorted({n for _, names in everyone for n in names})]


def equal(found: DTensor, whole: torch.Tensor) -> bool:
    """Whether this rank's rows are those of `whole`, to the bit; a rank may have none."""
    parts = whole.chunk(dist.get_world_size())
    mine = parts[dist.get_rank()] if dist.get_rank() < len(parts) else whole[:0]
    return torch.equal(found.to_local().detach().view(torch.int16), mine.view(torch.int16))


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    job = json.loads(Path(sys.argv[1]).read_text())
    weights = torch.load(job["weights"], weights_only=True, mmap=True)
    first = job["loads"][0]
    load(*first, weights, mesh)  # what torch imports for its first load is not the checkpoint's
    found = [load(folder, held, weights, mesh) for folder, held in job["loads"]]
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
