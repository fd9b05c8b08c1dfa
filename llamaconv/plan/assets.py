"""Find what describes the model, and the folder with its small files; report what disagrees.

A DCP has neither. The folder that its receipt names is used instead, or the one that the user
gives with ``--assets``. What the user gives for this conversion decides about everything that the
weights do not show, and each difference is a warning. Without it, the file that the readers of the
source use decides: config.json, params.json, or the receipt of a DCP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import copy_command, path_or_address
from llamaconv.checkpoint.checkpoint import OF_TRAINERS, Checkpoint, ModelConfig
from llamaconv.checkpoint.dcp import usual_layout
from llamaconv.checkpoint.folder import try_json_in
from llamaconv.checkpoint.fused import split_fused
from llamaconv.checkpoint.hub_address import HubAddress
from llamaconv.checkpoint.huggingface import CONFIG, NOT_IN_WEIGHTS, read_config
from llamaconv.checkpoint.receipt import NAME
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.tensors import shapes_by_role
from llamaconv.checkpoint.untrusted.files import try_json
from llamaconv.model.config_json import NOT_CARRIED
from llamaconv.model.families import FAMILIES
from llamaconv.model.names import identify
from llamaconv.model.params import SIZES, LlamaParams
from llamaconv.model.params_json import PARAMS
from llamaconv.model.published import closest_published, token_ids
from llamaconv.plan.small_files import SmallFiles, find_small_files
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, RefusedError, warning


@dataclass(frozen=True)
class Assets:
    """What describes a model in addition to its weights, and its small files.

    Attributes:
        source: The source with parameters, and every problem about where they come from.
        folder: The folder with config.json and the tokenizer; None if none is known.
        config: config.json of that folder, if it was needed and could be read.
        further: Entries of a written config.json that do not follow from parameters and tensors.
        files: The small files that the target gets, and those that it does not.
    """

    source: Checkpoint
    folder: Path | None
    config: ModelConfig | None
    further: Mapping[str, Any]
    files: SmallFiles


def find_assets(source: Checkpoint, target: Target) -> Assets:
    """Find what describes the model of ``source``, and which small files ``target`` gets."""
    problems = [] if target.assets else contradictions(source)
    folder = _folder(source, target, problems)
    params, config = source.params, None
    if params is None and (found := _without_params(source, target, folder)):
        problems.append(found)
    elif (
        params is None or target.assets or target.format == "huggingface" or source.format == "meta"
    ):
        config = _config(source, folder, problems)
    if config is not None and config is not source.config:
        if target.assets or params is None:
            problems += [problem for problem in config.problems if problem not in source.problems]
            params = _given(source, config, problems)
        elif wrong := _unfit(source, config):
            problems.append(wrong)
            folder = config = None
        elif params is not None and config.params is not None:
            params = _completed(source, params, config.params)
            problems += _recorded(source, params, config)
    further: Mapping[str, Any] = {}
    if config is not None:
        further = {k: v for k, v in config.entries.items() if k not in NOT_CARRIED}
    elif source.format != "huggingface" and params is not None:
        params, further, unsaid = _published_entries(source, params, target)
        problems += unsaid
    files = find_small_files(folder, source, target)
    problems += files.problems
    rope = source.rope
    if source.format in OF_TRAINERS and source.receipt is None and params is not None:
        rope = usual_layout(source.tensors, source.naming, params)
    kept = _kept(source, target, config)
    known = replace(source, params=params, rope=rope, problems=(*kept, *problems))
    return Assets(split_fused(known), folder, config, further, files)


def contradictions(found: Checkpoint) -> list[Problem]:
    """Compare the receipt in a folder with its config.json or params.json."""
    if found.receipt is None or found.config is None or found.params is None:
        return []
    stated = found.params if found.format == "meta" else found.config.params
    recorded = found.receipt.params
    if stated is None or not (differences := stated.differences(recorded)):
        return []
    text = f"{found.config.path}: says {_listed(differences)} as {NAME} beside it"
    if not differences.keys().isdisjoint(SIZES):
        return [
            Problem(
                f"{text}. Heads and sizes do not change, so one of the files is of another model: "
                "restore the right one, or move the receipt away"
            )
        ]
    return [
        warning(f"{text}. It decides, because it is what other programs read. Restore it if not")
    ]


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return each entry with both values, in the words of config.json."""
    return ", ".join(
        f"{name} {_shown(one)}, not {_shown(other)}" for name, (one, other) in differences.items()
    )


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def _folder(source: Checkpoint, target: Target, problems: list[Problem]) -> Path | None:
    """Return the folder that the small files come from; None if none is known."""
    if target.assets:
        return _given_folder(target.assets, problems)
    folder = source.folder
    # Hugging Face's repositories of Llama hold Meta's files under original/.
    if source.format in ("huggingface", "meta") or _has_config(source, None):
        return folder if isinstance(folder, Path) else None
    recorded = source.receipt.source.assets if source.receipt else None
    return Path(recorded) if recorded and Path(recorded).is_dir() else None


def _has_config(source: Checkpoint, folder: Path | None) -> bool:
    """Return whether there is a config.json in ``folder``, or else next to the source's weights."""
    where = folder or source.folder
    if isinstance(where, Path):
        return (where / CONFIG).is_file()
    return source.remote is not None and source.remote.is_file(CONFIG)


def _given_folder(assets: str, problems: list[Problem]) -> Path | None:
    try:
        where = path_or_address(assets)
    except RefusedError as error:
        problems += error.problems
        return None
    if isinstance(where, HubAddress):
        message = f"--assets must be a local folder. Download it: {where.download()}"
        problems.append(Problem(f"{assets}: {message}"))
        return None
    if isinstance(where, StoreAddress):
        message = f"--assets must be a local folder. Copy it here: {copy_command(where)}"
        problems.append(Problem(f"{where}: {message}"))
        return None
    folder = where.expanduser()
    if (folder / CONFIG).is_file():
        return folder
    reason = "and this has none" if folder.is_dir() else "and this is not found"
    if folder.is_file():
        reason = f"and this is a file. Pass {folder.parent}"
    problems.append(Problem(f"{folder}: --assets needs a folder with config.json, {reason}"))
    return None


def _without_params(source: Checkpoint, target: Target, folder: Path | None) -> Problem | None:
    """Return a problem if no file has the parameters that weights do not contain."""
    if target.assets:
        return None  # what is wrong with that folder is reported
    if source.format in OF_TRAINERS and not (
        (folder or source.remote) and _has_config(source, folder)
    ):
        return Problem(
            f"{source.path}: no receipt (llamaconv.json) gives the number of heads and the RoPE "
            "base. Pass a folder with the model's config.json with --assets"
        )
    if source.remote is not None and folder is None:
        if source.remote.is_file(CONFIG):
            return None  # opening the source has reported what is wrong with it
        return Problem(
            f"{source.folder / CONFIG}: not found. {NOT_IN_WEIGHTS} Pass a folder with the "
            "model's config.json with --assets"
        )
    if source.format == "huggingface" and folder and not (folder / CONFIG).is_file():
        return Problem(
            f"{folder / CONFIG}: not found. {NOT_IN_WEIGHTS} Copy the model's config.json next to "
            "them, or pass its folder with --assets"
        )
    return None


def _config(source: Checkpoint, folder: Path | None, problems: list[Problem]) -> ModelConfig | None:
    """Read config.json of ``folder``, or else next to a source that is not here.

    What opening the source has read is not read again.
    """
    if folder is None and source.remote is None:
        return None
    path = (folder or source.folder) / CONFIG
    if source.config is not None and source.config.path == path:
        return source.config
    if source.format == "huggingface" and (folder or source.folder) == source.folder:
        return None  # opening the source has reported what is wrong with it
    if not _has_config(source, folder):
        return None
    if isinstance(path, Path):
        entries = try_json(path, problems)
    else:
        assert source.remote is not None
        entries = try_json_in(source.remote, CONFIG, problems)
    return None if entries is None else read_config(path, entries, source.tensors, source.naming)


def _kept(source: Checkpoint, target: Target, config: ModelConfig | None) -> list[Problem]:
    """Return the problems of the source, without those of a config.json that does not decide."""
    if not target.assets or config is None or source.config == config:
        return list(source.problems)
    if source.config is not None:
        of_own = {problem for problem in source.config.problems if problem.level == "warning"}
        return [problem for problem in source.problems if problem not in of_own]
    # That there is none is no problem any more.
    missing = [
        f"{path}: " for path in (source.folder / CONFIG, _params_json(source)) if not _exists(path)
    ]
    return [one for one in source.problems if not one.message.startswith(tuple(missing))]


def _params_json(source: Checkpoint) -> Path | RemoteFile:
    original = source.folder / "original"
    has_original = isinstance(original, Path) and original.is_dir()
    return (original if has_original else source.folder) / PARAMS


def _exists(path: Path | RemoteFile) -> bool:
    return isinstance(path, Path) and path.exists()


def _given(source: Checkpoint, config: ModelConfig, problems: list[Problem]) -> LlamaParams | None:
    """Return the parameters of a config.json that decides; what contradicts it is a problem."""
    told, stated = source.params, config.params
    if stated is None or any(problem.level == "error" for problem in config.problems):
        return told or stated
    if wrong := _unfit(source, config, given=True):
        problems.append(wrong)
        return told
    if told is None:
        return stated
    if differences := stated.differences(told):
        problems.append(
            warning(
                f"{config.path}: says {_listed(differences)} as {_where(source)}. It was given for "
                "this conversion (--assets), so it decides"
            )
        )
    return replace(stated, max_position=stated.max_position or told.max_position)


def _where(source: Checkpoint) -> str:
    """Name the file that the parameters of a source come from."""
    if source.format in OF_TRAINERS or source.config is None:
        return f"the receipt of {source.path}"
    return str(source.config.path)


def _unfit(source: Checkpoint, config: ModelConfig, given: bool = False) -> Problem | None:
    """Return the problem that a config.json is of another model than the weights."""
    stated = config.params
    family = [problem for problem in config.problems if problem.level == "error"]
    if stated is None or family:
        reason = family[0].message.removeprefix(f"{config.path}: ") if family else "cannot be read"
        text = f"{config.path}: {reason}"
    elif wrong := _wrong_sizes(source, stated):
        text = f"{config.path}: is of another model than {source.path}: {', '.join(wrong)}"
    else:
        return None
    if given:
        return Problem(f"{text}. Pass the folder of this model with --assets")
    return warning(
        f"{text}. Nothing is taken from that folder. Pass one with the model's config.json and "
        "tokenizer with --assets"
    )


def _wrong_sizes(source: Checkpoint, stated: LlamaParams) -> list[str]:
    """Return each size that the weights, or the parameters of the source, contradict."""
    shapes = shapes_by_role(source.tensors, source.naming)
    layers = [known[1] for name in source.tensors if (known := identify(name, source.naming))]
    numbers = [layer for layer in layers if layer is not None]
    measured = {
        "vocab_size": shapes.get("tok_embeddings", ())[:1],
        "dim": shapes.get("tok_embeddings", ())[1:2],
        "ffn_dim": shapes.get("w1", ())[:1],
        "q_rows": shapes.get("wq", ())[:1],
        "kv_rows": shapes.get("wk", ())[:1],
        "n_layers": (max(numbers) + 1,) if numbers else (),
    }
    wrong = {
        name: f"{name} {getattr(stated, name)}, the weights have {size[0]}"
        for name, size in measured.items()
        if size and size[0] != getattr(stated, name)
    }
    if lacking := [role for role in FAMILIES[stated.family].roles if shapes and role not in shapes]:
        has = " and ".join(lacking)
        wrong["family"] = f"model_type {stated.family!r} has {has}, the weights do not"
    for name, (one, other) in stated.differences(source.params or stated).items():
        if name in SIZES and name not in wrong:
            wrong[name] = f"{name} {one}, {_where(source)} says {other}"
    return list(wrong.values())


def _completed(source: Checkpoint, params: LlamaParams, beside: LlamaParams) -> LlamaParams:
    """Return parameters with what only config.json states: positions, the factor of a scaling."""
    params = replace(params, max_position=params.max_position or beside.max_position)
    is_scaled = params.rope_scaling is not None and beside.rope_scaling is not None
    if source.format == "meta" and source.receipt is None and is_scaled:
        return replace(params, rope_scaling=beside.rope_scaling)
    return params


def _recorded(source: Checkpoint, params: LlamaParams, config: ModelConfig) -> list[Problem]:
    """Report how the config.json beside the small files differs from what decides."""
    assert config.params is not None
    differences = params.differences(config.params)
    if not differences:
        return []
    return [
        warning(
            f"{_where(source)}: says {_listed(differences)} as {config.path}, which only supplies "
            "further entries and the tokenizer. If that file is right, pass its folder with "
            "--assets"
        )
    ]


# Entries whose absence lets transformers assume something (`Family.defaults`).
_ASSUMED = ("max_position_embeddings", "bos_token_id", "eos_token_id")


def _published_entries(
    source: Checkpoint, params: LlamaParams, target: Target
) -> tuple[LlamaParams, dict[str, Any], list[Problem]]:
    """Return what is known of a model that has no config.json.

    Returns:
        The parameters, with the context of a published model that has all others; the ids of its
        tokens by the size of its vocabulary; and, for a Hugging Face target, a warning that names
        what was filled in and what is not known.
    """
    filled: dict[str, Any] = {}
    if params.max_position is None and (context := closest_published(params).max_position):
        params = replace(params, max_position=context)
        filled["max_position_embeddings"] = context
    if target.format != "huggingface":
        return params, {}, []
    tokens = token_ids(params.vocab_size)
    filled |= tokens
    # null, because an id that transformers assumes is another token in most vocabularies.
    entries = {"bos_token_id": None, "eos_token_id": None, **tokens}
    text = f"{source.path}: no config.json is known"
    if filled:
        shown = ", ".join(f"{name} {value}" for name, value in filled.items())
        text += f"; written as in the published models: {shown}"
        if tokens.get("bos_token_id") == 128000:
            text += " (instruction models end a turn with 128009 as well)"
    assumed = FAMILIES[params.family].defaults
    unknown = {
        name: assumed[name]
        for name in _ASSUMED
        if name not in filled and not (name.startswith("max") and params.max_position)
    }
    if unknown:
        text += f"; not known: {', '.join(unknown)}"
    if "max_position_embeddings" in unknown:
        text += f" (transformers assumes {unknown['max_position_embeddings']} positions)"
    return params, entries, [warning(f"{text}. Pass a folder with config.json with --assets")]
