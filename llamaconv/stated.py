"""What the files beside the weights say of the model, held against what it is.

Weights carry neither heads nor RoPE's base, so a loader believes config.json, params.json or the
receipt: an entry that is wrong there is as bad as a row in the wrong place.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamaconv.config import from_config
from llamaconv.files import try_json
from llamaconv.formats.huggingface import CONFIG, INDEX, SINGLE
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.params_json import ffn_width, from_params_json
from llamaconv.pieces import shapes_by_role
from llamaconv.problems import Problem

_PARAMS = "params.json"
# What params.json has no place for.
_NOT_METAS = ("head_dim", "ffn_dim", "tied", "rope_scaling", "max_position")


def stated_otherwise(target: Checkpoint, params: LlamaParams) -> list[str]:
    """A sentence for each entry beside the weights of ``target`` that is not of ``params``.

    What llamaconv wrote has to say everything; of other people's folders, what is absent is
    taken as their readers take it. What cannot be read at all is in ``target.problems``.
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
    folder = target.folder
    assert isinstance(folder, Path)
    if not (folder / CONFIG).is_file():
        return [f"{CONFIG} is not there"] if target.receipt else []
    entries = try_json(folder / CONFIG, [])
    if entries is None:
        return []
    found, problems = from_config(entries, shapes_by_role(target.tensors, "huggingface"), CONFIG)
    # Only transformers counts positions: another format's parameters may leave them open.
    but = () if params.max_position else ("max_position",)
    wrong = _differences(CONFIG, found, params, but) if found else []
    if target.receipt:
        wrong += _absent(problems)
        if not (folder / INDEX).is_file() and {file.name for file in target.local_files} != {
            SINGLE
        }:
            wrong.append(f"{INDEX} is not there, and several files or one of another name")
        dtypes = {tensor.dtype for tensor in target.tensors.values()}
        wanted: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtypes.pop() if len(dtypes) == 1 else None,
        }
        # transformers 5 calls it so; a folder that it saved anew means the same.
        entries.setdefault("torch_dtype", entries.get("dtype"))
        wrong += _other_entries(CONFIG, entries, wanted)
    return wrong


def _in_params_json(target: Checkpoint, params: LlamaParams) -> list[str]:
    from llamaconv.formats.meta import find_folder

    folder = find_folder(target.local_path) or target.local_path
    entries = try_json(folder / _PARAMS, [])
    if entries is None:
        return []
    found, problems = from_params_json(entries, shapes_by_role(target.tensors, "meta"), _PARAMS)
    wrong = _differences(_PARAMS, found, params, _NOT_METAS) if found else []
    if target.receipt:
        wrong += _absent([one for one in problems if not one.is_inherent])
        scaled = params.rope_scaling is not None
        wrong += _other_entries(_PARAMS, entries, {"use_scaled_rope": scaled})
        wrong += _width(entries, params)
    return wrong


def _width(entries: dict[str, Any], params: LlamaParams) -> list[str]:
    """Meta's code computes the width of the feed-forward from two entries."""
    multiple_of, multiplier = entries.get("multiple_of"), entries.get("ffn_dim_multiplier")
    try:
        width = ffn_width(params.dim, multiple_of, multiplier)  # type: ignore[arg-type]
    except (TypeError, ValueError, ArithmeticError):
        width = None
    if width == params.ffn_dim:
        return []
    return [
        f"{_PARAMS}: multiple_of {multiple_of!r} and ffn_dim_multiplier {multiplier!r} give a "
        f"feed-forward of {width} by Meta's formula, the weights have {params.ffn_dim}"
    ]


def _absent(problems: list[Problem]) -> list[str]:
    return [problem.message for problem in problems if problem.level == "warning"]


def _differences(
    where: str, found: LlamaParams, expected: LlamaParams, but: tuple[str, ...] = ()
) -> list[str]:
    stated, wanted = asdict(found), asdict(expected)
    return [
        f"{where}: {name} is {stated[name]!r}, {value!r} expected"
        for name, value in wanted.items()
        if name not in but and stated[name] != value
    ]


def _other_entries(where: str, entries: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{where}: {name} is {entries.get(name)!r}, {value!r} expected"
        for name, value in wanted.items()
        if entries.get(name) != value or type(entries.get(name)) is not type(value)
    ]
