"""params.json of Meta's original files, read into `LlamaParams`.

It says less than config.json: no width of the feed-forward, no factor of the RoPE scaling (8 is
built into Meta's code), sometimes no vocabulary. Those come from the tensors or from that code,
and it is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaconv.config import ParamsReader
from llamaconv.family import LLAMA_31_SCALING, LLAMA_32_SCALING, PUBLISHED
from llamaconv.params import MOST_HEADS, MOST_LAYERS, LlamaParams, RopeScaling
from llamaconv.problems import Problem

# apply_scaling in Meta's llama-models, models/llama3/model.py: constants, not parameters.
META_SCALING = LLAMA_31_SCALING
# Llama 3.2 1B and 3B were released with the same params.json entry and a factor of 32.
_LLAMA_32_WIDTHS = {
    (one.dim, one.n_layers) for one in PUBLISHED if one.rope_scaling == LLAMA_32_SCALING
}
# Meta's llama (2023) has no such entry and 10000 in its code.
_META_DEFAULT_THETA = 10000.0


def from_params_json(
    entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[LlamaParams | None, list[Problem]]:
    """Parameters from params.json, with every problem found.

    ``shapes`` are those of the whole tensors, one a role. None where a size is missing.
    """
    reader = ParamsReader(entries, where)
    dim, n_heads = reader.count("dim"), reader.count("n_heads", most=MOST_HEADS)
    n_layers = reader.count("n_layers", most=MOST_LAYERS)
    n_kv_heads = reader.count("n_kv_heads", default=n_heads, most=MOST_HEADS)
    if dim % n_heads or n_heads % n_kv_heads:
        reader.size_error(
            f"dim {dim}, n_heads {n_heads} and n_kv_heads {n_kv_heads} do not divide each other"
        )
    ffn_dim, vocab_size = (_rows(reader, shapes, role) for role in ("w1", "tok_embeddings"))
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


def _rows(reader: ParamsReader, shapes: Mapping[str, tuple[int, ...]], role: str) -> int:
    """Rows of a tensor, which params.json does not say; 0 where it is missing, as is said elsewhere."""
    shape = shapes.get(role)
    if shape is not None and (not shape or not shape[0]):
        reader.size_error(f"{role} has no rows to take a width from, its shape is {list(shape)}")
    return shape[0] if shape else 0


def to_params_json(params: LlamaParams) -> dict[str, Any]:
    """params.json from which Meta's formula gives the same widths; see `unfit`."""
    multiple_of, multiplier = _feed_forward(params.dim, params.ffn_dim)
    entries = {
        "dim": params.dim,
        "n_layers": params.n_layers,
        "n_heads": params.n_heads,
        "n_kv_heads": params.n_kv_heads,
        "vocab_size": params.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
        "use_scaled_rope": params.rope_scaling is not None,
    }
    return {name: value for name, value in entries.items() if value is not None}


def unfit(params: LlamaParams) -> list[Problem]:
    """What of ``params`` Meta's format has no place for."""
    problems = []
    if params.q_rows != params.dim:
        problems.append(
            Problem(
                f"{params.n_heads} heads of {params.head_dim} are not dim {params.dim}; Meta's code "
                "has heads of dim / n_heads only"
            )
        )
    if params.rope_scaling not in (None, META_SCALING):
        message = (
            f"params.json has no factor for the RoPE scaling, Meta's code has 8 built in; this model's "
            f"is {params.rope_scaling}"
        )
        known = (params.dim, params.n_layers) in _LLAMA_32_WIDTHS
        if known and params.rope_scaling == LLAMA_32_SCALING:
            problems.append(Problem(f"{message}, as Meta's own Llama 3.2 files", level="warning"))
        else:
            problems.append(Problem(message))
    return problems


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward by Meta's formula (llama-models, models/llama3/model.py)."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def _feed_forward(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give ``ffn_dim``; released ones first."""
    for multiplier in (None, 1.3, 1.5, 1.0, 1.2):
        for multiple_of in (256, 1024, 4096, 512, 2048):
            if ffn_width(dim, multiple_of, multiplier) == ffn_dim:
                return multiple_of, multiplier
    # A multiple of the width itself, and a multiplier that lands just under it.
    return ffn_dim, (ffn_dim - 0.5) / int(2 * (4 * dim) / 3)


def _scaling(reader: ParamsReader, dim: int, n_layers: int) -> RopeScaling | None:
    if not reader.values.get("use_scaled_rope", False):
        return None
    if (dim, n_layers) in _LLAMA_32_WIDTHS:
        reader.warn(
            "use_scaled_rope names no factor; 32 is taken, as Llama 3.2's config.json has it for "
            "this width and depth (Meta's own code would use 8)",
            is_inherent=True,
        )
        return LLAMA_32_SCALING
    return META_SCALING
