"""llamaconv's advice, taken at its word: `python advice_side.py logits JOB.json`, or `train JOB.json`.

Runs inside a TorchTitan environment, as titan_side.py does. The idea: the advised words go to
TorchTitan's own reader of its command line, which imports the advised `converted_llama.py` from the
folder that it lies in, as from the current one. The limit: FlexAttention, which the module of 0.3.0
asks for, is compiled for a GPU. `on_a_cpu` leaves the compiling out, and for a training step, where it
has no backward pass on a CPU at all, dense attention under the same mask stands in. The module's text
is not touched.

A job is a JSON object. `logits`: `out` and `runs`, each with `name`, `folder` (of the module), `words`
(what the advised command has after `torchtitan.train`), `dcp` and `tokens` (rows of ids); `out` gets
`{name: logits}`. `train`: `folder`, `words` and `out`, which gets what titan_side.py's `train` gives.
"""

import importlib
import json
import math
import os
import sys
from typing import Any

import torch
from titan_models import OLDER
from titan_side import alone, load, pretend_gpu, train_noting
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


def logits(job: dict[str, Any]) -> None:
    """Loads each DCP into the model that its advice defines, and runs the tokens."""
    on_a_cpu(trains=False)
    torch.save({run["name"]: _logits(run) for run in job["runs"]}, job["out"])


def _logits(run: dict[str, Any]) -> torch.Tensor:
    tokens = torch.tensor(run["tokens"])
    enter(run["folder"])
    model = _model_0_2(run["words"]) if OLDER else _model_0_3(run["words"])
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)  # so one that a load forgets is seen
        load(model.eval(), run["dcp"])
        if OLDER:
            return model(tokens)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        masks = model.get_attention_masks(positions=positions)
        return model(tokens, positions=positions, attention_masks=masks)


def enter(folder: str) -> None:
    """As if Python were started there by `-m`; a module of that name seen earlier is forgotten."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.modules.pop("converted_llama", None)
    importlib.invalidate_caches()


def _model_0_2(words: list[str]) -> nn.Module:
    """What `Trainer.__init__` of 0.2.2 does up to its model."""
    from torchtitan.config import ConfigManager
    from torchtitan.protocols.train_spec import get_train_spec

    config = ConfigManager().parse_args(words)
    importlib.import_module(config.experimental.custom_import)
    spec = get_train_spec(config.model.name)
    args = spec.model_args[config.model.flavor]
    args.update_from_config(config)
    return spec.model_cls(args)


def _model_0_3(words: list[str]) -> nn.Module:
    """What `Trainer.__init__` of 0.3.0 does up to its model."""
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(words)
    config.model_spec.model.update_from_config(config=config)
    return config.model_spec.model.build()


def train(job: dict[str, Any]) -> None:
    """Runs TorchTitan's `main` with the advised words and what a CPU and a test add to them."""
    pretend_gpu()
    enter(job["folder"])
    # 0.2.x reads the command line while its configuration is imported, so it is set before that.
    sys.argv = ["train.py", *job["words"]]
    on_a_cpu(trains=True)
    train_noting(job["out"])


def on_a_cpu(trains: bool) -> None:
    """FlexAttention without compiling; to train, dense attention under FlexAttention's own mask."""
    torch.compiler.set_stance("force_eager")
    if trains and not OLDER:
        from torchtitan.models.common.attention import FlexAttention

        FlexAttention._compiled_flex_attn = staticmethod(_dense)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: Any, **how: Any
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.flex_attention import create_mask

    rows, columns = q.shape[2], k.shape[2]
    mask = create_mask(block_mask.mask_mod, q.shape[0], None, rows, columns, q.device)
    how = {name: how[name] for name in ("scale", "enable_gqa")}
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, **how), None


if __name__ == "__main__":
    alone()
    mode, path = sys.argv[1:]
    with open(path) as file:
        {"logits": logits, "train": train}[mode](json.load(file))
