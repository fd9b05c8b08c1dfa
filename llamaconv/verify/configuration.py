"""Check that config.json, params.json and the receipt describe the model that the weights hold.

Weights contain neither the number of heads nor RoPE's base, so a loader believes these files: a
wrong entry is as bad as a row in the wrong place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llamaconv.checkpoint.address import local
from llamaconv.checkpoint.checkpoint import Checkpoint, ModelConfig
from llamaconv.checkpoint.folder import LocalFolder
from llamaconv.checkpoint.huggingface import CONFIG
from llamaconv.checkpoint.huggingface_index import INDEX, SINGLE
from llamaconv.checkpoint.tensors import shapes_by_role
from llamaconv.model.families import FAMILIES
from llamaconv.model.params import LlamaParams
from llamaconv.model.params_json import PARAMS, ffn_width

# Parameters that params.json does not have.
_NOT_METAS = ("family", "rope_entry", "head_dim", "ffn_dim", "tied", "rope_scaling", "max_position")


def config_mismatches(target: Checkpoint, params: LlamaParams) -> list[str]:
    """Return a sentence for each entry next to the weights of ``target`` that is wrong.

    A target with a receipt must have every entry. In other folders a missing entry means what its
    readers take it to mean. What cannot be read at all is in ``target.problems``.

    Args:
        target: The opened target.
        params: The parameters that its files should have.
    """
    wrong = []
    if target.receipt:
        recorded = target.receipt.params
        but = () if recorded.max_position and params.max_position else ("max_position",)
        wrong += _differences("the receipt", recorded, params, but)
    if target.format == "huggingface":
        wrong += _in_config(target, params)
    elif target.format == "meta":
        wrong += _in_params_json(target, params)
    return wrong


def _in_config(target: Checkpoint, params: LlamaParams) -> list[str]:
    config = target.config
    folder = target.remote or LocalFolder(local(target.folder))
    if config is None:
        is_missing = target.receipt and not folder.is_file(CONFIG)
        return [f"{CONFIG} is missing"] if is_missing else []
    # Only transformers counts positions; parameters from another format may lack them.
    but = () if params.max_position else ("max_position",)
    wrong = _differences(CONFIG, config.params, params, but) if config.params else []
    if target.receipt:
        wrong += _absent(config)
        if not folder.is_file(INDEX) and [*target.file_bytes] != [SINGLE]:
            wrong.append(f"{INDEX} is missing, and the weights are not in one file called {SINGLE}")
        family = FAMILIES[params.family]
        dtypes = {tensor.dtype for tensor in target.tensors.values()}
        wanted: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "torch_dtype": dtypes.pop() if len(dtypes) == 1 else None,
            **family.flags_of(shapes_by_role(target.tensors, target.naming)),
        }
        # transformers 5 calls it dtype, in a folder that it saved again.
        entries = {
            "torch_dtype": config.entries.get("dtype"),
            **dict.fromkeys(family.flags, False),
            **config.entries,
        }
        wrong += _other_entries(CONFIG, entries, wanted)
    return wrong


def _in_params_json(target: Checkpoint, params: LlamaParams) -> list[str]:
    config = target.config
    if config is None:
        return []
    wrong = _differences(PARAMS, config.params, params, _NOT_METAS) if config.params else []
    if target.receipt:
        wrong += _absent(config)
        scaled = params.rope_scaling is not None
        wrong += _other_entries(PARAMS, config.entries, {"use_scaled_rope": scaled})
        wrong += _width(config.entries, params)
    return wrong


def _width(entries: Mapping[str, Any], params: LlamaParams) -> list[str]:
    """Check the two entries from which Meta's code computes the width of the feed-forward."""
    multiple_of, multiplier = entries.get("multiple_of"), entries.get("ffn_dim_multiplier")
    try:
        width = ffn_width(params.dim, multiple_of, multiplier)  # type: ignore[arg-type]
    except (TypeError, ValueError, ArithmeticError):
        width = None
    if width == params.ffn_dim:
        return []
    return [
        f"{PARAMS}: multiple_of {multiple_of!r} and ffn_dim_multiplier {multiplier!r} give a "
        f"feed-forward of {width} by Meta's formula, the weights have {params.ffn_dim}"
    ]


def _absent(config: ModelConfig) -> list[str]:
    return [
        problem.message.replace(str(config.path), config.path.name, 1)
        for problem in config.problems
        if problem.level == "warning" and not problem.is_inherent
    ]


def _differences(
    where: str, found: LlamaParams, expected: LlamaParams, but: tuple[str, ...] = ()
) -> list[str]:
    stated, wanted = asdict(found), asdict(expected)
    return [
        f"{where}: {name} is {stated[name]!r}; expected {value!r}"
        for name, value in wanted.items()
        if name not in but and stated[name] != value
    ]


def _other_entries(where: str, entries: Mapping[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{where}: {name} is {entries.get(name)!r}; expected {value!r}"
        for name, value in wanted.items()
        if entries.get(name) != value or type(entries.get(name)) is not type(value)
    ]
