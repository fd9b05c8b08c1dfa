"""Trains the bundled sample, a small Llama over bytes, and writes it as a Hugging Face folder.

    python tests/support/train_sample.py DST

Text: ``pydoc_data/topics.py`` of CPython 3.11, the reference manual under the PSF licence.
The last tenth is held out; some KB of it ship beside the weights, so that the loss is the
same on every Python. Seeded; some minutes on two cores. Bits of the result depend on the
machine's arithmetic, which is why the trained folder itself is bundled.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llamaconv.model import forward
from llamaconv.model.names import ROLES, every_role
from llamaconv.model.params import LlamaParams

LENGTH = 256  # positions it is trained on, and so all that it can read
PARAMS = LlamaParams(
    dim=128,
    n_layers=4,
    n_heads=8,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=384,
    vocab_size=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=LENGTH,
)
HELD_OUT_BYTES = 8192
SHARDS = 3


def text() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[topic] for topic in sorted(topics)).encode()


def initial_weights() -> dict[tuple[str, int | None], Tensor]:
    weights = {}
    for role, layer in every_role(PARAMS):
        shape = role.shape(PARAMS)
        if len(shape) == 1:
            weight = torch.ones(shape)
        else:
            # Narrower where a branch is added back, so that the depth does not matter.
            narrow = math.sqrt(2 * PARAMS.n_layers) if role.name in ("wo", "w2") else 1.0
            weight = torch.randn(shape) * 0.02 * math.sqrt(8) / narrow
        weights[role.name, layer] = weight.requires_grad_()
    return weights


def train(
    data: Tensor, steps: int, batch: int, length: int
) -> dict[tuple[str, int | None], Tensor]:
    weights = initial_weights()
    matrices = [w for w in weights.values() if w.ndim == 2]
    gains = [w for w in weights.values() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    began = time.monotonic()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        starts = torch.randint(len(data) - length, (batch,))
        tokens = torch.stack([data[start : start + length] for start in starts])
        # The layout of the model is Hugging Face's from the first step on.
        loss = forward.loss(forward.forward(weights, PARAMS, tokens, "half_split"), tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return {key: weight.detach().to(torch.bfloat16) for key, weight in weights.items()}


def write(weights: dict[tuple[str, int | None], Tensor], folder: Path, held_out: bytes) -> None:
    """Weights as shards with an index, config.json in transformers 4's spelling, tokenizer, text."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        ROLES[role].in_naming("huggingface", layer) or role: weight
        for (role, layer), weight in weights.items()
    }
    total = sum(weight.nbytes for weight in named.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, weight in named.items():
        shards[min(SHARDS - 1, written * SHARDS // total)][name] = weight
        written += weight.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    dump(folder / "model.safetensors.index.json", index)
    dump(folder / "config.json", config())
    dump(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": 200})
    dump(folder / "tokenizer.json", tokenizer())
    dump(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "held_out.txt").write_bytes(held_out)


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": PARAMS.head_dim,
        "hidden_act": "silu",
        "hidden_size": PARAMS.dim,
        "intermediate_size": PARAMS.ffn_dim,
        "max_position_embeddings": PARAMS.max_position,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": PARAMS.n_heads,
        "num_hidden_layers": PARAMS.n_layers,
        "num_key_value_heads": PARAMS.n_kv_heads,
        "rms_norm_eps": PARAMS.norm_eps,
        "rope_scaling": None,
        "rope_theta": PARAMS.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": PARAMS.vocab_size,
    }


def tokenizer() -> dict[str, object]:
    """A tokenizer whose token is the byte itself, in the format of ``tokenizers``."""
    # The byte-level alphabet: printable bytes stand for themselves, the others come after 255.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {"type": "BPE", "vocab": {letter[b]: b for b in range(256)}, "merges": []},
    }


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the bundled sample")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    torch.manual_seed(0)
    everything = text()
    cut = len(everything) * 9 // 10
    held_out = everything[cut : cut + HELD_OUT_BYTES]
    weights = train(torch.tensor(list(everything[:cut])), options.steps, batch=16, length=LENGTH)
    write(weights, options.folder, held_out)
    tokens = torch.tensor(list(held_out)).unflatten(0, (-1, LENGTH))
    for layout in ("half_split", "interleaved"):
        loss = forward.loss(forward.forward(weights, PARAMS, tokens, layout), tokens)
        print(f"held-out loss with the {layout} rotation: {loss:.3f} nats a byte")


if __name__ == "__main__":
    main()
