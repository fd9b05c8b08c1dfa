"""params.json of Meta's original files, read into `LlamaParams` and written back.

It states less than config.json: no width of the feed-forward, no factor of the RoPE scaling (8 is
built into Meta's code), sometimes no size of the vocabulary. These come from the tensors or from
that code, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamaconv.model.config_json import ParamsReader, kv_heads
from llamaconv.model.families import family_with
from llamaconv.model.params import MOST_HEADS, MOST_LAYERS, LlamaParams, RopeScaling
from llamaconv.model.published import LLAMA_31_SCALING, LLAMA_32_SCALING, PUBLISHED
from llamaconv.report.errors import Problem

PARAMS = "params.json"

# apply_scaling in Meta's llama-models, models/llama3/model.py: constants, not parameters.
META_SCALING = LLAMA_31_SCALING
# Llama 3.2 1B and 3B have the same entry in params.json, but a factor of 32. Width and depth of a
# published model decide; no two of them with different factors share both.
_LLAMA_31_WIDTHS, _LLAMA_32_WIDTHS = (
    {(one.dim, one.n_layers) for one in PUBLISHED if one.rope_scaling == scaling}
    for scaling in (META_SCALING, LLAMA_32_SCALING)
)
# Entries of Mistral's params.json for what other models than a Llama have.
_NOT_LLAMAS = ("moe", "vision_encoder", "quantization", "sliding_window", "lora", "llama_4_scaling")
# Meta's llama (2023) has no such entry, and 10000 in its code.
_META_DEFAULT_THETA = 10000.0


def from_params_json(
    entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[LlamaParams | None, list[Problem]]:
    """Read the parameters from the entries of params.json.

    Args:
        entries: The entries.
        shapes: One shape per role, of whole tensors.
        where: The file, for messages.

    Returns:
        The parameters, and every problem found. None if a size is missing or impossible.
    """
    reader = ParamsReader(entries, where)
    dim, n_heads = reader.count("dim"), reader.count("n_heads", most=MOST_HEADS)
    n_layers = reader.count("n_layers", most=MOST_LAYERS)
    # At least 1: what is wrong with a dim that is smaller than n_heads follows below.
    head_dim = reader.count("head_dim", default=max(1, dim // n_heads))
    n_kv_heads = kv_heads(reader, "n_kv_heads", n_heads, head_dim, shapes)
    stated_size = entries.get("head_dim") is not None  # an entry of Mistral's params.json
    if (dim % n_heads and not stated_size) or n_heads % n_kv_heads:
        reader.size_error(
            f"dim must be a multiple of n_heads, and n_heads of n_kv_heads; got {dim}, {n_heads} "
            f"and {n_kv_heads}"
        )
    for entry in _NOT_LLAMAS:
        if entries.get(entry):
            reader.error(
                f"{entry} is {entries[entry]!r}; a Llama has no such part, other models of Mistral do"
            )
    ffn_dim, vocab_size = (_rows(reader, shapes, role) for role in ("w1", "tok_embeddings"))
    stated = entries.get("vocab_size", -1)
    if stated == -1 and vocab_size:
        reader.warn(f"vocab_size is {stated}; using {vocab_size} from tok_embeddings")
    elif stated not in (-1, vocab_size) and vocab_size:
        reader.error(f"vocab_size is {stated!r}, but tok_embeddings has {vocab_size} rows")
    theta = entries.get("rope_theta")
    if theta is None:
        theta = _META_DEFAULT_THETA
        reader.warn(f"rope_theta is missing; using {theta:g}, as in Meta's Llama 1 and 2")
    return (
        LlamaParams(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            norm_eps=reader.number("norm_eps", entries.get("norm_eps")),
            rope_theta=reader.number("rope_theta", theta),
            rope_scaling=_scaling(reader, dim, n_layers),
            family=family_with(shapes).model_type,
        )
        if reader.sized
        else None
    ), reader.problems


def completed(stated: LlamaParams, recorded: LlamaParams) -> LlamaParams:
    """Return what params.json states, with what it cannot state from a receipt."""
    scaling = stated.rope_scaling
    if (scaling is None) == (recorded.rope_scaling is None):
        scaling = recorded.rope_scaling  # params.json has no factor
    return replace(
        stated,
        rope_scaling=scaling,
        rope_entry=recorded.rope_entry,
        tied=recorded.tied,
        max_position=recorded.max_position,
        family=recorded.family,
    )


def _rows(reader: ParamsReader, shapes: Mapping[str, tuple[int, ...]], role: str) -> int:
    """Return the rows of a tensor; 0 if it is missing, which is reported elsewhere."""
    shape = shapes.get(role)
    if shape is not None and (not shape or not shape[0]):
        reader.size_error(f"{role} has the shape {list(shape)}, without rows to take a width from")
    return shape[0] if shape else 0


def to_params_json(params: LlamaParams) -> dict[str, Any]:
    """Return params.json from which Meta's code computes the same widths; see `unfit`."""
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
    """Return a problem for everything in ``params`` that Meta's format cannot express."""
    problems = []
    if params.q_rows != params.dim:
        problems.append(
            Problem(
                f"{params.n_heads} heads of {params.head_dim} do not make up dim {params.dim}; "
                "in Meta's code each head has dim / n_heads rows"
            )
        )
    if params.rope_scaling not in (None, META_SCALING):
        message = (
            "params.json cannot state the RoPE scaling, and a factor of 8 is built into Meta's "
            f"code; this model has {params.rope_scaling}"
        )
        known = (params.dim, params.n_layers) in _LLAMA_32_WIDTHS
        if known and params.rope_scaling == LLAMA_32_SCALING:
            problems.append(Problem(f"{message}, as Meta's own Llama 3.2 files", level="warning"))
        else:
            problems.append(Problem(message))
    return problems


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the feed-forward's width by Meta's code (llama-models, models/llama3/model.py)."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def _feed_forward(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """Return ``multiple_of`` and ``ffn_dim_multiplier`` for ``ffn_dim``, released ones first."""
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
            "use_scaled_rope names no factor; using 32, as in Llama 3.2's config.json for this "
            "width and depth (Meta's own code would use 8)",
            is_inherent=True,
        )
        return LLAMA_32_SCALING
    if (dim, n_layers) not in _LLAMA_31_WIDTHS:
        reader.warn(
            "use_scaled_rope names no factor; using 8, as in Meta's own code for Llama 3.1. Llama "
            "3.2 needs 32: if this is one, pass the folder with its config.json with --assets",
            is_inherent=True,
        )
    return META_SCALING
