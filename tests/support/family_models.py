"""Small models of each family, as transformers makes, saves and runs them.

Heads of 16 rows, query heads that are neither the kv heads nor their square, heads that together are
not as wide as the model, layers to 11 where layer 10 could be taken for layer 1. Every tensor has values
of its own: norms and biases start as ones and zeros, which would hide two that were exchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

POSITIONS, VOCABULARY = 128, 96

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
_NARROW = {"num_attention_heads": 3, "num_key_value_heads": 1}  # three heads of 16 are 48

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3, tied": {
        "model_type": "qwen3",
        "head_dim": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 12,
        "tie_word_embeddings": True,
    },
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", **_NARROW},
    "qwen2, tied": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama, biases": {
        "model_type": "llama",
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral, a window of the context": {
        "model_type": "mistral",
        "sliding_window": 512,
        **_NARROW,
    },
    "llama, dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        **_NARROW,
    },
    "llama, attention biases": {"model_type": "llama", "attention_bias": True, **_NARROW},
}
"""What each model has in its config.json besides `_SHAPE`."""


def save(name: str, folder: Path, dtype: str = "float32", **changes: Any) -> Path:
    """Writes the model of this name as transformers does."""
    entries = {**_SHAPE, **MODELS[name], **changes}
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    model = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=random)
            middle = 1 if weight_name.endswith("norm.weight") else 0
            weight.copy_(middle + (0.3 if weight.ndim == 1 else 0.15) * values)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tokens(rows: int = 2, positions: int = POSITIONS) -> Tensor:
    return torch.randint(VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(7))


def logits(folder: Path, ids: Tensor | None = None) -> Tensor:
    """The logits of the weights in ``folder``, in fp32, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found: Tensor = model.eval()(tokens() if ids is None else ids).logits
    return found
