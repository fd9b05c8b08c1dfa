"""LlamaParams: one description of the model, whatever file it was read from.

The weights do not contain RoPE's base or scaling, so these come from a configuration file
(`config_json` reads that of transformers, `params_json` Meta's) or from a receipt.
Limit: Llama as TorchTitan and Meta define it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from sys import float_info
from typing import Any, TypeGuard

from llamaconv.model.families import FAMILIES

MOST_LAYERS = 1024
"""Eight times as many as the deepest Llama has (405B: 126). Each layer costs names in memory."""

MOST_HEADS = 4096
"""32 times as many as 405B has."""

MOST = 2**31 - 1
"""Far above every other size of a Llama."""


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
"""The attributes of `LlamaParams` that are the same for as long as a model has its weights."""

_IN_CONFIG = {
    "family": "model_type",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
    "window": "sliding_window",
    "rope_entry": "the kind of RoPE",
}


def most_of(size: str) -> int:
    """Return the largest value of a size of `LlamaParams` that an untrusted file may state."""
    return {"n_layers": MOST_LAYERS, "n_heads": MOST_HEADS, "n_kv_heads": MOST_HEADS}.get(
        size, MOST
    )


def is_count(value: object, most: int = MOST) -> TypeGuard[int]:
    """Return whether ``value`` is a whole number from 1 to ``most``."""
    return type(value) is int and 0 < value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a positive number that a float can hold."""
    return type(value) in (int, float) and 0 < value <= float_info.max  # type: ignore[operator]


OTHER_ROPE_TYPES = ("dynamic", "longrope", "yarn")
"""Kinds of RoPE of transformers that are carried between its own folders, as config.json has them."""


def rope_entry(entries: Mapping[str, Any]) -> str:
    """Return the canonical JSON of an entry of config.json that describes RoPE, without its base."""
    return json.dumps({k: v for k, v in entries.items() if k != "rope_theta"}, sort_keys=True)


def _is_rope_entry(value: object) -> bool:
    try:
        entry = json.loads(value) if isinstance(value, str) and value else {}
    except (ValueError, RecursionError):
        return False
    kind = entry.get("rope_type", entry.get("type")) if isinstance(entry, dict) else None
    return value == "" or kind in OTHER_ROPE_TYPES


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotation's frequencies (see `rope.inverse_frequencies`).

    Attributes:
        factor: How many times slower pairs of a long wavelength rotate.
        low_freq_factor: Pairs with fewer rotations in ``original_max_position`` are slowed down.
        high_freq_factor: Pairs with more rotations in it keep their speed.
        original_max_position: The context of training before the scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    @classmethod
    def linear(cls, factor: float) -> RopeScaling:
        """Return the scaling that slows down all pairs alike, as transformers' type "linear" does.

        Every wavelength is at least 2π positions, so with an original length of 1 each pair counts
        as one of a long wavelength. TorchTitan's ComplexRoPE then gives the same angles to the bit.
        """
        return cls(factor, 1.0, 4.0, 1)

    @property
    def is_linear(self) -> bool:
        """Whether it is the same for all pairs (see `linear`)."""
        return self == RopeScaling.linear(self.factor)

    def __str__(self) -> str:
        if self.is_linear:
            return f"linear, factor {self.factor:g}"
        return (
            f"factor {self.factor:g}, {self.low_freq_factor:g} to {self.high_freq_factor:g} "
            f"rotations in {self.original_max_position:,}"
        )


@dataclass(frozen=True)
class LlamaParams:
    """What describes a Llama in addition to its weights.

    Attributes:
        dim: Width of the model, in elements.
        n_layers: Number of layers.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads; query heads share them in equal groups.
        head_dim: Rows per head; even.
        ffn_dim: Width of the feed-forward, in elements.
        vocab_size: Number of tokens.
        norm_eps: Added to the mean square in RMSNorm.
        rope_theta: RoPE's base.
        rope_scaling: Scaling of RoPE's frequencies, if there is one.
        tied: Whether the head is the embedding.
        max_position: The longest context, in tokens, if a file states it.
        family: The model family, a key of `llamaconv.model.families.FAMILIES`.
        window: How many tokens some layers look back, if that is less than the longest context.
        rope_entry: What config.json says of a kind of RoPE that only Hugging Face's files can express
            (`OTHER_ROPE_TYPES`), as canonical JSON; "" for other kinds.
    """

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
    family: str = "llama"
    window: int | None = None
    rope_entry: str = ""

    def differences(self, other: LlamaParams) -> dict[str, tuple[Any, Any]]:
        """Return both values of each attribute that differs, by the names of config.json.

        A longest context that only one of them states is no difference.
        """
        pairs = {
            one.name: (getattr(self, one.name), getattr(other, one.name)) for one in fields(self)
        }
        if None in pairs["max_position"]:
            del pairs["max_position"]
        return {
            _IN_CONFIG.get(name, name): both for name, both in pairs.items() if both[0] != both[1]
        }

    @property
    def rope_type(self) -> str:
        """The kind of RoPE of `rope_entry`; "" if there is none."""
        entry = json.loads(self.rope_entry) if self.rope_entry else {}
        return str(entry.get("rope_type", entry.get("type", "")))

    @property
    def q_rows(self) -> int:
        """Rows of wq: ``n_heads * head_dim``, which need not be ``dim``."""
        return self.n_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of wk and of wv: ``n_kv_heads * head_dim``."""
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of wq, wk and wv together."""
        return self.q_rows + 2 * self.kv_rows

    def to_json(self) -> dict[str, Any]:
        """Return the attributes by their names, as receipts have them."""
        return asdict(self)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> LlamaParams:
        """Return the parameters from what `to_json` gave.

        Raises:
            ValueError: A value cannot be that of a Llama.
            TypeError: An entry is missing or unknown.
        """
        scaling = entries.get("rope_scaling")
        params = cls(**{**entries, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        params._check()
        return params

    def _check(self) -> None:
        """Raise ``ValueError`` if a value cannot be that of a Llama."""
        for one in fields(self):
            value, most = getattr(self, one.name), most_of(one.name)
            if one.name == "family":
                is_valid = isinstance(value, str) and value in FAMILIES
                expected = f"one of {', '.join(FAMILIES)}"
            elif one.name == "rope_entry":
                is_valid, expected = _is_rope_entry(value), "an entry of config.json, or empty"
            elif one.name == "tied":
                is_valid, expected = type(value) is bool, "true or false"
            elif one.name == "rope_scaling":
                is_valid = value is None or all(is_number(n) for n in vars(value).values())
                expected = "positive numbers"
            elif one.name in ("norm_eps", "rope_theta"):
                is_valid, expected = is_number(value), "a positive number"
            else:
                may_lack = one.name in ("max_position", "window")
                is_valid = is_count(value, most) or (may_lack and value is None)
                expected = f"a whole number from 1 to {most}"
            if not is_valid:
                raise ValueError(f"{one.name} must be {expected}; got {value!r}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(
                "head_dim must be even, and n_heads a multiple of n_kv_heads; got "
                f"{self.head_dim}, {self.n_heads} and {self.n_kv_heads}"
            )

    def __str__(self) -> str:
        scaling = ""
        if self.rope_scaling:
            kind = "linear " if self.rope_scaling.is_linear else ""
            scaling = f", {kind}scaling factor {self.rope_scaling.factor:g}"
        return (
            f"{self.n_layers} layers of width {self.dim}, {self.n_heads} heads of {self.head_dim}, "
            f"{self.n_kv_heads} kv heads, ffn {self.ffn_dim}, vocabulary {self.vocab_size}, "
            f"RoPE base {self.rope_theta:g}{scaling}{', tied head' if self.tied else ''}"
        )
