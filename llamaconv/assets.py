"""Where a model's small files come from: config.json, generation config, tokenizer.

A DCP carries none of them. What its receipt names, or what the user gives with ``--assets``,
stands in, and supplies parameters where there is no receipt at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamaconv import keys
from llamaconv.config import from_config
from llamaconv.files import try_json
from llamaconv.pieces import Checkpoint
from llamaconv.plan import Target
from llamaconv.problems import Problem, warning


def assets_folder(source: Checkpoint, target: Target) -> Path | None:
    """The folder that ``target`` takes its small files from, None where there is none."""
    if target.assets:
        return Path(target.assets).expanduser()
    if source.format == "huggingface":
        return source.path if source.path.is_dir() else source.path.parent
    # Hugging Face's repositories of Llama hold Meta's files under original/.
    if source.format == "meta" and (source.path / "config.json").is_file():
        return source.path
    recorded = source.receipt["source"].get("assets") if source.receipt else None
    if recorded and (Path(recorded) / "config.json").is_file():
        return Path(recorded)
    return None


def with_params(source: Checkpoint, target: Target) -> Checkpoint:
    """``source`` with parameters and every problem about where they come from."""
    problems: list[Problem] = []
    folder = assets_folder(source, target)
    if target.assets and folder is not None and not (folder / "config.json").is_file():
        problems.append(Problem(f"{folder}: --assets names a folder that has no config.json"))
        folder = None
    params = source.params
    if params is None and source.format == "dcp":
        if folder is None:
            problems.append(
                Problem(
                    f"{source.path}: no receipt (llamaconv.json) says how many heads the model has, "
                    "nor its RoPE base; give a folder with the model's config.json as --assets"
                )
            )
        elif (config := try_json(folder / "config.json", problems)) is not None:
            shapes: dict[str, tuple[int, ...]] = {}
            for name, tensor in source.tensors.items():
                if known := keys.identify(name, source.naming):
                    shapes.setdefault(known[0].name, tensor.shape)
            params, found = from_config(config, shapes, str(folder / "config.json"))
            problems += found
    if target.to == "hf" and folder is None and not target.assets:
        problems.append(
            warning(
                f"{source.path}: no folder with the model's tokenizer is known, so only config.json "
                "is written; give one as --assets"
            )
        )
    return replace(source, params=params, problems=(*source.problems, *problems))
