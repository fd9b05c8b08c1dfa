"""LlamaParams: one description of the model, whatever file it was read from.

Weights carry neither RoPE's base nor its scaling, so these come from a configuration file
(`config` reads transformers' config.json, `params_json` Meta's params.json) or a receipt.
Limit: Llama as TorchTitan and Meta define it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from sys import float_info
from typing import Any, TypeGuard

MOST_LAYERS = 1024
"""Eight times the deepest Llama (405B: 126); names are made for each layer."""

MOST_HEADS = 4096
"""32 times those of 405B."""

MOST = 2**31 - 1
"""What every other size is far below."""


def most_of(size: str) -> int:
    """The largest value of a size of `LlamaParams` that a file of a stranger is believed."""
    return {"n_layers": MOST_LAYERS, "n_heads": MOST_HEADS, "n_kv_heads": MOST_HEADS}.get(
        size, MOST
    )


def is_count(value: object, most: int = MOST) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a positive number that a float can hold."""
    return type(value) in (int, float) and 0 < value <= float_info.max  # type: ignore[operator]


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
        """Raises ``ValueError`` where a value cannot be that of a Llama."""
        for one in fields(self):
            value, most = getattr(self, one.name), most_of(one.name)
            if one.name == "tied":
                right, wanted = type(value) is bool, "true or false was expected"
            elif one.name == "rope_scaling":
                right = value is None or all(is_number(n) for n in vars(value).values())
                wanted = "positive numbers were expected"
            elif one.name in ("norm_eps", "rope_theta"):
                right, wanted = is_number(value), "a positive number was expected"
            else:
                right = is_count(value, most) or (one.name == "max_position" and value is None)
                wanted = f"a positive whole number was expected, no Llama has more than {most}"
            if not right:
                raise ValueError(f"{one.name} is {value!r}; {wanted}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.n_heads} heads of {self.head_dim} and {self.n_kv_heads} kv heads; heads are "
                "of an even size, and share kv heads in equal groups"
            )

    def __str__(self) -> str:
        scaling = f", scaling factor {self.rope_scaling.factor:g}" if self.rope_scaling else ""
        return (
            f"{self.n_layers} layers of width {self.dim}, {self.n_heads} heads of {self.head_dim}, "
            f"{self.n_kv_heads} kv heads, ffn {self.ffn_dim}, vocabulary {self.vocab_size}, "
            f"RoPE base {self.rope_theta:g}{scaling}{', tied head' if self.tied else ''}"
        )
