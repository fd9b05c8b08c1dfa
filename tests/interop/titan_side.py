"""What TorchTitan makes of a checkpoint: `python titan_side.py logits JOB.json`, or `train JOB.json`.

Runs inside an environment that has a TorchTitan release and neither llamaconv nor transformers, so that
nothing of ours can help it. The idea: TorchTitan's own code loads, and its own trainer steps. The limit:
one process, a CPU and fp32; what TorchTitan asks of a GPU is answered by the stubs of `pretend_gpu`.

A job is a JSON object. `logits`: `tokens` (rows of ids), `out`, and `runs`, each with `name`, `params`
and `dcp`; `out` gets `{name: {"logits": tensor} or {"error": text}}`. `train`: `params`, `flags`
and `out`, which gets `input`, `labels`, `loss` and, from 0.3.0, `positions`, one entry a step. With
`batches`, a file of such entries, each step trains on the `input` and `labels` of one of them instead.
"""

import json
import os
import socket
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def logits(job: dict[str, Any]) -> None:
    """Loads each DCP into the model that its parameters describe, and runs the tokens."""
    tokens = torch.tensor(job["tokens"])
    torch.save({run["name"]: _logits(run, tokens) for run in job["runs"]}, job["out"])


def _logits(run: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    from titan_models import build

    model = build(run["params"])
    try:
        load(model, run["dcp"])
    except BaseException as error:  # DCP's own CheckpointException is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    with torch.no_grad():
        return {"logits": model(tokens)}


def load(model: torch.nn.Module, checkpoint: str) -> None:
    """Loads a model-only DCP as TorchTitan's CheckpointManager does."""
    from torchtitan.components.checkpoint import ModelWrapper

    wrapper = ModelWrapper(model)
    states = wrapper.state_dict()
    dcp.load(states, checkpoint_id=checkpoint)
    wrapper.load_state_dict(states)


def train(job: dict[str, Any]) -> None:
    """Runs TorchTitan's `main` with real flags on a flavour made from the parameters."""
    pretend_gpu()
    from titan_models import FLAVOUR_FLAGS, register

    # 0.2.x reads the command line while its configuration is imported, so it is set before that.
    sys.argv = ["train.py", *FLAVOUR_FLAGS, *job["flags"]]
    register(job["params"])
    train_noting(job["out"], job.get("batches"))


def train_noting(out: str, batches: str | None = None) -> None:
    """Runs TorchTitan's `main` on `sys.argv`, noting each batch and its loss before it is rounded."""
    from titan_models import OLDER

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if OLDER:
        from torchtitan.train import Trainer, main
    else:
        from torchtitan.train import main
        from torchtitan.trainer import Trainer

    given = torch.load(batches, weights_only=True) if batches else []
    steps: list[dict[str, Any]] = []
    step = Trainer.forward_backward_step

    def noting(self: Any, *, input_dict: Any, labels: Any, global_valid_tokens: Any) -> Any:
        if given:
            one = given[len(steps)]
            input_dict, labels = input_dict | {"input": one["input"]}, one["labels"]
        batch = {name: value.clone() for name, value in input_dict.items()} | {"labels": labels}
        loss = step(
            self, input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        steps.append(batch | {"loss": loss.item()})
        return loss

    Trainer.forward_backward_step = noting
    main(Trainer) if OLDER else main()
    torch.save(steps, out)


def pretend_gpu() -> None:
    """Answers on a CPU what TorchTitan asks of its accelerator; no number of a loss depends on it."""
    torch._utils._get_available_device_type = lambda: "cpu"
    memory = SimpleNamespace(total_memory=1 << 34)
    answers = {
        "get_device_name": "cpu",
        "get_device_properties": memory,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "memory_stats": {},
        "current_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)

    barrier = dist.barrier
    dist.barrier = lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)
    if not hasattr(dist, "set_timeout"):  # 0.3.0 calls what came with torch 2.14
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout


def alone() -> None:
    assert not any(map(find_spec, ("llamaconv", "transformers"))), "TorchTitan is to judge alone"


if __name__ == "__main__":
    alone()
    mode, path = sys.argv[1:]
    with open(path) as file:
        {"logits": logits, "train": train}[mode](json.load(file))
