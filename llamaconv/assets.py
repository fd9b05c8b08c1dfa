"""Where a model's small files come from: config.json, generation config, tokenizer.

A DCP carries none of them. What its receipt names, or what the user gives with ``--assets``,
stands in, and supplies parameters where there is no receipt at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamaconv.config import from_config
from llamaconv.files import try_json
from llamaconv.formats.huggingface import CONFIG
from llamaconv.fused import take_apart
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.pieces import shapes_by_role
from llamaconv.plan import Target
from llamaconv.problems import Problem, warning
from llamaconv.remote import Remote


def assets_folder(source: Checkpoint, target: Target) -> Path | None:
    """The folder that ``target`` takes its small files from, None where there is none."""
    if target.assets:
        return Path(target.assets).expanduser()
    folder = source.folder
    if isinstance(folder, Remote):
        return None
    if source.format == "huggingface":
        return folder
    # Hugging Face's repositories of Llama hold Meta's files under original/.
    if source.format == "meta" and (folder / CONFIG).is_file():
        return folder
    recorded = source.receipt.source.assets if source.receipt else None
    if recorded and (Path(recorded) / CONFIG).is_file():
        return Path(recorded)
    return None


def with_params(source: Checkpoint, target: Target) -> Checkpoint:
    """``source`` with parameters and every problem about where they come from."""
    problems: list[Problem] = []
    folder = assets_folder(source, target)
    if target.assets and folder is not None and not (folder / CONFIG).is_file():
        problems.append(Problem(f"{folder}: --assets names a folder that has no config.json"))
        folder = None
    params = source.params
    if params is None and (found := _without_params(source, target, folder)):
        problems.append(found)
    elif params is None and folder is not None and source.format in ("dcp", "huggingface"):
        params, found_in_config = _params_of(source, folder)
        problems += found_in_config
    if target.to == "hf" and folder is None and not target.assets and source.place is None:
        problems.append(
            warning(
                f"{source.path}: no folder with the model's tokenizer is known, so only config.json "
                "is written; give one as --assets"
            )
        )
    return take_apart(replace(source, params=params, problems=(*source.problems, *problems)))


def _without_params(source: Checkpoint, target: Target, folder: Path | None) -> Problem | None:
    """The problem, where no file says what the weights do not."""
    if source.format == "dcp" and folder is None:
        return Problem(
            f"{source.path}: no receipt (llamaconv.json) says how many heads the model has, "
            "nor its RoPE base; give a folder with the model's config.json as --assets"
        )
    if source.place is not None and folder is None and not target.assets:
        if source.place.is_file(CONFIG):
            return None  # opening the source read it, and said what is wrong
        return Problem(
            f"{source.folder / CONFIG}: is not there; heads, RoPE base and scaling are in no "
            "weight. Give a folder with the model's config.json as --assets"
        )
    if source.format == "huggingface" and folder and not (folder / CONFIG).is_file():
        return Problem(
            f"{folder / CONFIG}: is not there; heads, RoPE base and scaling are in no weight. "
            "Copy config.json of the model beside the weights, or give its folder as --assets"
        )
    return None


def _params_of(source: Checkpoint, folder: Path) -> tuple[LlamaParams | None, list[Problem]]:
    problems: list[Problem] = []
    if source.format == "huggingface" and folder == source.folder:
        return None, problems  # opening the source read it, and said what is wrong
    config = try_json(folder / CONFIG, problems)
    if config is None:
        return None, problems
    shapes = shapes_by_role(source.tensors, source.naming)
    params, found = from_config(config, shapes, str(folder / CONFIG))
    return params, problems + found
