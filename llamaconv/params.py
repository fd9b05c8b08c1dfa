"""LlamaParams: one description of the model, whatever file it was read from.

Weights carry neither RoPE's base nor its scaling, so these come from a configuration file
(`config` reads transformers' config.json, `params_json` Meta's params.json) or a receipt.
Limit: Llama as TorchTitan and Meta define it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotation's frequencies (see `rope.inverse_frequencies`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LlamaParams:
    """What a Llama is, beside its weights. Lengths in elements, counts in heads or layers."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    max_position: int | None = None

    @property
    def q_rows(self) -> int:
        """Rows of wq: ``n_heads * head_dim``, which need not be ``dim``."""
        return self.n_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of wk and of wv: ``n_kv_heads * head_dim``."""
        return self.n_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> LlamaParams:
        """The inverse of `to_json`, for receipts."""
        scaling = entries.get("rope_scaling")
        return cls(**{**entries, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    def __str__(self) -> str:
        scaling = f", scaling factor {self.rope_scaling.factor:g}" if self.rope_scaling else ""
        return (
            f"{self.n_layers} layers of width {self.dim}, {self.n_heads} heads of {self.head_dim}, "
            f"{self.n_kv_heads} kv heads, ffn {self.ffn_dim}, vocabulary {self.vocab_size}, "
            f"RoPE base {self.rope_theta:g}{scaling}{', tied head' if self.tied else ''}"
        )
