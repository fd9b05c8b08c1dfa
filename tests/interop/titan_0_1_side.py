"""The advice for TorchTitan 0.1.0, taken at its word: `python titan_0_1_side.py JOB.json`.

Runs in the environment of a later release with 0.1.0 put in front of it (`wheel` in the job), since
the two need the same packages. The idea: 0.1.0's own reader of its command line, its own table of
flavours and its own model. The limit: logits only; its trainer wants a GPU and a tiktoken file, so the
vocabulary is the module's and not that of a tokenizer.

A job is a JSON object: `wheel`, `out`, and `runs` as advice_side.py has them.
"""

import importlib
import json
import math
import sys
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def logits(run: dict[str, Any]) -> torch.Tensor:
    from torchtitan.config_manager import ConfigManager
    from torchtitan.protocols.train_spec import get_train_spec

    sys.path.insert(0, run["folder"])
    sys.modules.pop("converted_llama", None)
    importlib.invalidate_caches()
    tokens = torch.tensor(run["tokens"])
    # The command line of 0.1.0 insists on a tokenizer file that is there.
    config = ConfigManager().parse_args([*run["words"], "--model.tokenizer_path", __file__])
    importlib.import_module(config.experimental.custom_import)
    spec = get_train_spec(config.model.name)
    args = spec.config[config.model.flavor]
    args.max_seq_len = tokens.shape[1]
    model = spec.cls(args).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)  # so one that a load forgets is seen
        load(model, run["dcp"])
        return model(tokens)


def load(model: torch.nn.Module, checkpoint: str) -> None:
    from torchtitan.components.checkpoint import ModelWrapper

    wrapper = ModelWrapper(model)
    states = wrapper.state_dict()
    # As 0.1.0's CheckpointManager does where it loads a model alone.
    states.pop("freqs_cis")
    dcp.load(states, checkpoint_id=checkpoint)
    wrapper.load_state_dict(states)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    sys.path.insert(0, job["wheel"])
    torch.save({run["name"]: logits(run) for run in job["runs"]}, job["out"])
