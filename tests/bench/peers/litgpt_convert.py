"""LitGPT's importer, `litgpt.scripts.convert_hf_checkpoint` (release 0.5.13).

    python litgpt_convert.py SRC DST

It writes one ``lit_model.pth`` with q, k and v in one matrix, rows half_split. It writes beside what it
reads, so DST gets links to SRC's files; the model's size is made known to its table of models.
"""

import json
import sys
from pathlib import Path

from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint


def main(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    name_to_config["bench"] = {
        "name": "bench",
        "hf_config": {},
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_query_groups": config["num_key_value_heads"],
        "n_embd": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file.resolve())
    convert_hf_checkpoint(target, model_name="bench")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
