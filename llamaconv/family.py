"""Which Llama a checkpoint is: the published sizes, told apart by shapes and RoPE's parameters.

Sizes from the papers (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama team 2024,
arXiv:2407.21783) and the params.json and config.json of Meta's releases. The limit: fine-tuned
and re-trained models have the same shapes, so this is a family, not a set of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaconv.params import LlamaParams


@dataclass(frozen=True)
class Published:
    """One published size. ``factor`` is that of the RoPE scaling, None for none."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    factor: float | None = None

    def same_sizes(self, params: LlamaParams) -> bool:
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
        return all(getattr(self, name) == getattr(params, name) for name in names)

    def same(self, params: LlamaParams) -> bool:
        factor = params.rope_scaling.factor if params.rope_scaling else None
        return (
            self.same_sizes(params)
            and self.vocab_size == params.vocab_size
            and self.rope_theta == params.rope_theta
            and self.factor == factor
        )


PUBLISHED = (
    Published("Llama 1 or 2 7B", 4096, 32, 32, 32, 11008, 32000, 1e4),
    Published("Llama 1 or 2 13B", 5120, 40, 40, 40, 13824, 32000, 1e4),
    Published("Llama 1 33B", 6656, 60, 52, 52, 17920, 32000, 1e4),
    Published("Llama 1 65B", 8192, 80, 64, 64, 22016, 32000, 1e4),
    Published("Llama 2 70B", 8192, 80, 64, 8, 28672, 32000, 1e4),
    Published("Llama 3 8B", 4096, 32, 32, 8, 14336, 128256, 5e5),
    Published("Llama 3 70B", 8192, 80, 64, 8, 28672, 128256, 5e5),
    Published("Llama 3.1 8B", 4096, 32, 32, 8, 14336, 128256, 5e5, 8.0),
    Published("Llama 3.1 or 3.3 70B", 8192, 80, 64, 8, 28672, 128256, 5e5, 8.0),
    Published("Llama 3.1 405B", 16384, 126, 128, 8, 53248, 128256, 5e5, 8.0),
    # The first release of 405B stored every kv head twice.
    Published("Llama 3.1 405B, kv heads doubled", 16384, 126, 128, 16, 53248, 128256, 5e5, 8.0),
    Published("Llama 3.2 1B", 2048, 16, 32, 8, 8192, 128256, 5e5, 32.0),
    Published("Llama 3.2 3B", 3072, 28, 24, 8, 8192, 128256, 5e5, 32.0),
)


def which_llama(params: LlamaParams | None) -> str:
    """A sentence: the published Llama with these parameters, or what is near and what differs."""
    if params is None:
        return "its parameters are not known"
    for one in PUBLISHED:
        if one.same(params):
            return one.name
    near = next((one for one in PUBLISHED if one.same_sizes(params)), None)
    if near is None:
        return "a Llama of its own, of no published size"
    factor = params.rope_scaling.factor if params.rope_scaling else None
    differs = [
        f"{what} {found:,g} instead of {expected:,g}"
        if expected and found
        else f"{what} {found or 'none'} instead of {expected or 'none'}"
        for what, found, expected in (
            ("vocabulary", params.vocab_size, near.vocab_size),
            ("RoPE base", params.rope_theta, near.rope_theta),
            ("RoPE scaling factor", factor, near.factor),
        )
        if found != expected
    ]
    return f"the sizes of {near.name}, with {', '.join(differs)}"
