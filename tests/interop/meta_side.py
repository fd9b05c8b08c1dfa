"""What Meta's own model makes of Meta's files: `python meta_side.py JOB.json`.

Runs inside an environment that has `llama-models` and neither llamaconv nor transformers, so that
nothing of ours can help it. The idea: Meta's `ModelArgs` reads params.json, Meta's loader gives each
model-parallel rank its part of the files, Meta's `Transformer` takes it strictly and computes. The
limit: processes on one CPU that talk over gloo, fp32, the whole prompt at once; not Meta's
`Llama3.build` itself, which wants a GPU's defaults and Meta's tokenizer.

A job is a JSON object: `tokens` (rows of ids), `out`, `load` and `save`. Each of `load` has `name`,
`folder` and `ranks`. Each of `save` has them too, and `params`, `dtype` and `seed`: a random model is
written to `folder` first, as Meta's model saves itself. `out` gets `{name: logits}`.
"""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_rank,
    initialize_model_parallel,
)
from llama_models.checkpoint import maybe_reshard_state_dict
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

RANKS = (1, 2)


def on_each_rank(rank: int, ranks: int, job: dict[str, Any]) -> None:
    """What one of `ranks` processes does; the first one keeps the logits, which all have."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{job['out']}.store.{ranks}", rank=rank, world_size=ranks
    )
    initialize_model_parallel(ranks)
    tokens = torch.tensor(job["tokens"])
    found = {}
    for run in job["save"]:
        if run["ranks"] == ranks:
            model = save(run, tokens)
            found[run["name"]] = model(tokens, 0)
    for run in job["load"]:
        if run["ranks"] == ranks:
            model = load(Path(run["folder"]), tokens)
            found[run["name"]] = model(tokens, 0)
    if rank == 0:
        torch.save(found, part(job, ranks))
    dist.destroy_process_group()


def load(folder: Path, tokens: torch.Tensor) -> Transformer:
    """Meta's model with the weights and parameters of a folder, as `Llama3.build` fills it."""
    model = build(json.loads((folder / "params.json").read_text()), tokens)
    paths = list(folder.glob("consolidated.*.pth"))
    state = maybe_reshard_state_dict(paths, n_kv_heads=model.params.n_kv_heads)
    torch.set_default_dtype(torch.float32)  # which that call sets to bfloat16
    model.load_state_dict(state, strict=True)
    return model


def save(run: dict[str, Any], tokens: torch.Tensor) -> Transformer:
    """A random model, of which every rank saves its part; parts differ, the copies of norms do not."""
    model = build(run["params"], tokens)
    rank, folder = get_model_parallel_rank(), Path(run["folder"])
    parts, norms = (torch.Generator().manual_seed(run["seed"] + add) for add in (1 + rank, 0))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=norms))
            else:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=parts))
    model.to(getattr(torch, run["dtype"]))
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / f"consolidated.{rank:02d}.pth")
    if rank == 0:
        (folder / "params.json").write_text(json.dumps(run["params"]))
    return model.float()


def build(params: dict[str, Any], tokens: torch.Tensor) -> Transformer:
    """The model in fp32. Every weight is NaN, so one that a load forgets is seen."""
    rows, positions = tokens.shape
    args = ModelArgs(max_batch_size=rows, max_seq_len=positions, **params)
    # Meta's class passes over what it does not know, and a default would stand in.
    assert all(hasattr(args, name) for name in params), f"Meta's ModelArgs lacks one of {params}"
    model = Transformer(args)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    return model.eval()


def part(job: dict[str, Any], ranks: int) -> str:
    return f"{job['out']}.{ranks}"


def alone() -> None:
    assert not any(map(find_spec, ("llamaconv", "transformers"))), "Meta's model is to judge alone"


if __name__ == "__main__":
    alone()
    with open(sys.argv[1]) as file:
        job = json.load(file)
    for ranks in RANKS:
        # Forked, since Meta's model takes far longer to import than to run at this size.
        torch.multiprocessing.start_processes(
            on_each_rank, (ranks, job), nprocs=ranks, start_method="fork"
        )
    found = {}
    for ranks in RANKS:
        found |= torch.load(part(job, ranks), weights_only=True)
    torch.save(found, job["out"])
