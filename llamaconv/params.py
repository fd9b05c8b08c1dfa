"""LlamaParams: one description of the model, whatever file it was read from.

Weights carry neither RoPE's base nor its scaling, so these come from a configuration file
(`config` reads transformers' config.json, `params_json` Meta's params.json) or a receipt.
Limit: Llama as TorchTitan and Meta define it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

MOST_LAYERS = 1024
"""Eight times the deepest Llama (405B: 126); names are made for each layer."""


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
        """The inverse of `to_json`, for receipts. Raises ``ValueError`` or ``TypeError``."""
        scaling = entries.get("rope_scaling")
        params = cls(**{**entries, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        params._check()
        return params

    def _check(self) -> None:
        """Raises ``ValueError`` where these are of no model at all."""
        counts = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        numbers = {name: getattr(self, name) for name in ("norm_eps", "rope_theta")}
        numbers |= asdict(self.rope_scaling) if self.rope_scaling else {}
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < inf:
                raise ValueError(f"{name} is {value!r}; a positive number was expected")
        for name in (*counts, "max_position"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name in counts or value is not None):
                raise ValueError(f"{name} is {value!r}; a positive whole number was expected")
        if self.n_layers > MOST_LAYERS:
            raise ValueError(f"{self.n_layers} layers; no Llama has more than {MOST_LAYERS}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.n_heads} heads of {self.head_dim} and {self.n_kv_heads} kv heads; heads are "
                "of an even size, and share kv heads in equal groups"
            )
        if type(self.tied) is not bool:
            raise ValueError(f"tied is {self.tied!r}; true or false was expected")

    def __str__(self) -> str:
        scaling = f", scaling factor {self.rope_scaling.factor:g}" if self.rope_scaling else ""
        return (
            f"{self.n_layers} layers of width {self.dim}, {self.n_heads} heads of {self.head_dim}, "
            f"{self.n_kv_heads} kv heads, ffn {self.ffn_dim}, vocabulary {self.vocab_size}, "
            f"RoPE base {self.rope_theta:g}{scaling}{', tied head' if self.tied else ''}"
        )
