"""What transformers makes of the same weights: the models under test and the yardstick.

The idea: a small random model of each kind, written by `save_pretrained`, read back by `from_pretrained`
and run in fp32 with the plainest attention. Every tensor has values of its own, norms included, since an
identity norm would hide two that were swapped, and matrices are wide enough that attention is far from
uniform, or a wrong rotation would not show. The limit: tens of thousands of weights, not billions.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
POSITIONS = 256  # enough for a factor of 8 to matter: short prompts hide a wrong scaling
VOCABULARY = 256


@dataclass(frozen=True)
class Kind:
    """One kind of Llama. `n_heads` is never `n_kv_heads` squared, and a head never under 8 rows."""

    dim: int = 64
    n_layers: int = 3
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 8
    ffn_dim: int = 152
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: dict[str, Any] | None = None
    tied: bool = False
    dtype: str = "float32"
    vocabulary: int = VOCABULARY

    def params(self) -> dict[str, Any]:
        """The same in the words of titan_models.py."""
        shape = asdict(self) | {"max_seq_len": POSITIONS}
        del shape["dtype"]
        shape["vocab_size"] = shape.pop("vocabulary")
        return shape


# What a user would call them: Llama 3 (twelve layers, so that layer 10 is not taken for layer 1);
# Llama 2; Llama 3.1; Llama 3.2; and one whose heads together are wider than the model.
KINDS = {
    "plain": Kind(n_layers=12),
    "a head each": Kind(n_heads=4, n_kv_heads=4, head_dim=16, rope_theta=10_000.0),
    "factor 8": Kind(rope_scaling=LLAMA_3_1, dtype="bfloat16"),
    "tied": Kind(rope_scaling=LLAMA_3_1 | {"factor": 32.0}, tied=True, dtype="bfloat16"),
    "wide": Kind(n_kv_heads=4, head_dim=16),
}


def save(kind: Kind, folder: Path, seed: int) -> Path:
    """Writes a random model of this kind as transformers does."""
    scaling = {"rope_type": "llama3"} | kind.rope_scaling if kind.rope_scaling else None
    config = LlamaConfig(
        vocab_size=kind.vocabulary,
        hidden_size=kind.dim,
        intermediate_size=kind.ffn_dim,
        num_hidden_layers=kind.n_layers,
        num_attention_heads=kind.n_heads,
        num_key_value_heads=kind.n_kv_heads,
        head_dim=kind.head_dim,
        rms_norm_eps=kind.norm_eps,
        rope_theta=kind.rope_theta,
        rope_scaling=scaling,
        max_position_embeddings=131_072,
        tie_word_embeddings=kind.tied,
    )
    model = LlamaForCausalLM(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            values = torch.randn(weight.shape, generator=random)
            weight.copy_(1 + 0.3 * values if weight.ndim == 1 else 0.15 * values)
    model.to(getattr(torch, kind.dtype)).save_pretrained(folder)
    return folder


def tokens(rows: int = 2, seed: int = 7) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, POSITIONS), generator=random)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the weights in `folder`, in fp32, by transformers."""
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(ids).logits


def loss(folder: Path, step: dict[str, Any]) -> float:
    """Mean cross-entropy of the weights in `folder` on a batch that TorchTitan drew."""
    scores = logits(folder, step["input"])
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), step["labels"].flatten()).item()
