"""What most published scripts do: load every tensor, re-order q and k, save the dictionary.

    python load_everything.py SRC DST      a Hugging Face folder to a DCP with TorchTitan's names

The shortest program that does the whole job, so that its time is that of the method.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    pairs = weight.view(heads, 2, rows // heads // 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def main(source: Path, target: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    state = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            for role, count in heads.items():
                if role in name:
                    weight = interleaved(weight, count)
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = weight
    dcp.save(state, checkpoint_id=target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
