"""params.json of Meta's original files, read into `LlamaParams`.

It says less than config.json: no width of the feed-forward, no factor of the RoPE scaling (8 is
built into Meta's code), sometimes no vocabulary. Those come from the tensors or from that code,
and it is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaconv.config import ParamsReader
from llamaconv.params import LlamaParams, RopeScaling
from llamaconv.problems import Problem

# apply_scaling in Meta's llama-models, models/llama3/model.py: constants, not parameters.
META_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
# Llama 3.2 1B and 3B were released with the same params.json entry and a factor of 32
# (rope_scaling in the config.json of both).
_LLAMA_32_SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)
_LLAMA_32_WIDTHS = {(2048, 16), (3072, 28)}
# Meta's llama (2023) has no such entry and 10000 in its code.
_META_DEFAULT_THETA = 10000.0


def from_params_json(
    entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[LlamaParams | None, list[Problem]]:
    """Parameters from params.json, with every problem found.

    ``shapes`` are those of the whole tensors, one a role. None where a size is missing.
    """
    reader = ParamsReader(entries, where)
    dim, n_layers, n_heads = (reader.count(name) for name in ("dim", "n_layers", "n_heads"))
    n_kv_heads = reader.count("n_kv_heads", default=n_heads)
    if dim % n_heads or n_heads % n_kv_heads:
        reader.size_error(
            f"dim {dim}, n_heads {n_heads} and n_kv_heads {n_kv_heads} do not divide each other"
        )
    ffn_dim, vocab_size = (shapes.get(role, (0,))[0] for role in ("w1", "tok_embeddings"))
    stated = entries.get("vocab_size", -1)
    if stated == -1:
        reader.warn(f"vocab_size is {stated}; {vocab_size} is taken from tok_embeddings")
    elif stated != vocab_size:
        reader.error(f"vocab_size is {stated!r}, tok_embeddings has {vocab_size} rows")
    theta = entries.get("rope_theta")
    if theta is None:
        theta = _META_DEFAULT_THETA
        reader.warn(f"rope_theta is absent; {theta:g} of Meta's Llama 1 and 2 is taken")
    return (
        LlamaParams(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            norm_eps=reader.number("norm_eps", entries.get("norm_eps")),
            rope_theta=reader.number("rope_theta", theta),
            rope_scaling=_scaling(reader, dim, n_layers),
        )
        if reader.sized
        else None
    ), reader.problems


def _scaling(reader: ParamsReader, dim: int, n_layers: int) -> RopeScaling | None:
    if not reader.values.get("use_scaled_rope", False):
        return None
    if (dim, n_layers) in _LLAMA_32_WIDTHS:
        reader.warn(
            "use_scaled_rope names no factor; 32 is taken, as Llama 3.2's config.json has it for "
            "this width and depth (Meta's own code would use 8)"
        )
        return _LLAMA_32_SCALING
    return META_SCALING
