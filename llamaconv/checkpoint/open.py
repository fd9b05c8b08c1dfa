"""Open a checkpoint of any format; refuse what is not a checkpoint, and say why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from llamaconv.checkpoint import huggingface, near_path, runs
from llamaconv.checkpoint.address import path_or_address
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.folder import LocalFolder, matching
from llamaconv.checkpoint.hub_address import SAFETENSORS, HubAddress
from llamaconv.checkpoint.huggingface_index import INDEX
from llamaconv.checkpoint.other_families import what_files_are
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.wrappers import with_wrappers_reported
from llamaconv.report.errors import RefusedError, collect_problems, first_few, warning

if TYPE_CHECKING:
    from llamaconv.checkpoint.store_folder import StoreFolder


def _open_dcp(path: Path) -> Checkpoint:
    from llamaconv.checkpoint import dcp

    return dcp.open_dcp(LocalFolder(path))


def _open_torch_checkpointing(path: Path) -> Checkpoint:
    from llamaconv.checkpoint import torch_checkpointing

    return torch_checkpointing.open_torch_checkpointing(path)


def _open_meta(path: Path) -> Checkpoint:
    from llamaconv.checkpoint import meta

    return meta.open_meta(LocalFolder(path))


@dataclass(frozen=True)
class Opener:
    """How a format is recognised and opened.

    Attributes:
        open: Opens a folder, or one of the files of ``single``.
        files: Patterns of names; a folder with such a file is of this format.
        single: Endings of names of files that may be opened on their own.
        unless: Patterns of names; a folder with such a file is of another format.
    """

    open: Callable[[Path], Checkpoint]
    files: tuple[str, ...]
    single: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


# The first that fits is taken.
OPENERS = {
    "dcp": Opener(_open_dcp, (".metadata",)),
    # Other programs call files metadata.pkl, too, and put them next to a model's.
    "torch_checkpointing": Opener(
        _open_torch_checkpointing,
        ("metadata.pkl",),
        unless=("model.safetensors", "*.safetensors.index.json", "consolidated.*.pth"),
    ),
    "huggingface": Opener(
        huggingface.open_huggingface,
        ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*"),
        (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"),
    ),
    "meta": Opener(_open_meta, ("consolidated.*.pth", "original/consolidated.*.pth")),
}


def open_checkpoint(path: str | Path | HubAddress | StoreAddress) -> Checkpoint:
    """Open a checkpoint from its headers.

    A Hugging Face folder opens without torch. A repository opens without torch at one commit, and
    needs huggingface_hub.

    Args:
        path: A folder, a file of a Hugging Face folder, ``hf://ORG/NAME[@REVISION]``, or the
            address of a folder in a store, such as ``s3://BUCKET/PREFIX``. For the folder of a
            run, or of its steps, the newest step is opened.

    Returns:
        The checkpoint. What is wrong inside it is in its ``problems``.

    Raises:
        RefusedError: ``path`` is not a checkpoint, or cannot be read.
    """
    where = path if isinstance(path, HubAddress | StoreAddress) else path_or_address(path)
    if isinstance(where, HubAddress):
        return with_wrappers_reported(_open_repository(where))
    if isinstance(where, StoreAddress):
        return _open_store(where)
    return with_wrappers_reported(_open_local(where)).remembered()


def _open_local(path: Path) -> Checkpoint:
    if not path.exists():
        raise RefusedError(f"{path}: not found{near_path.for_nothing(path)}")
    if path.is_file():
        for one in OPENERS.values():
            if path.name.endswith(one.single):
                _refuse_lookalikes(path, [path.name])
                return one.open(path)
        if files := huggingface.by_other_names(path.parent, [path.name]):
            return huggingface.open_files(path, files)
        remedy = near_path.for_file(path, looks_like_checkpoint)
        remedy = remedy or what_files_are(path.parent, [path.name])
        raise RefusedError(
            f"{path}: {remedy or 'neither a folder nor a .safetensors or .bin file'}"
        )
    if not path.is_dir():
        raise RefusedError(f"{path}: neither a folder nor a file")
    names = _names(path)
    if opener := _opener_for(names):
        _refuse_lookalikes(path, _matching(names, opener.files))
        return opener.open(path)
    if files := huggingface.by_other_names(path, names):
        return huggingface.open_files(path, files)
    steps = runs.steps_of(path, looks_like_checkpoint)
    if steps.newest is not None and not _of_another_tool(steps.newest):
        found = _open_local(steps.newest)
        return replace(found, problems=(runs.newest_taken(path, steps), *found.problems))
    inside = near_path.checkpoints_in(path, looks_like_checkpoint)
    remedy = _of_another_tool(inside[0]) if inside else ""
    remedy = remedy or near_path.for_folder(path, inside)
    raise RefusedError(f"{path}: {remedy or _not_a_checkpoint(path, names)}")


def _of_another_tool(folder: Path) -> str:
    """Return what a DCP is whose names are not a Llama's, such as Megatron's; else ""."""
    if not (folder / ".metadata").is_file():
        return ""
    found = collect_problems(lambda: _open_dcp(folder), [])
    foreign = found is not None and found.naming is None and bool(found.tensors)
    return f"it contains {found.errors[-1].message}" if found and foreign else ""


def _refuse_lookalikes(path: Path | RemoteFile, names: list[str]) -> None:
    """Raise `RefusedError` for another tool's files that an opener would take for its own."""
    if found := what_files_are(path, names, only_lookalikes=True):
        raise RefusedError(f"{path}: {found}")


def _names(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir()]
    return names + [f"original/{entry.name}" for entry in folder.glob("original/*")]


def looks_like_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` has files of a checkpoint; it may still be damaged."""
    try:
        names = _names(folder)
    except OSError:
        return False
    return _opener_for(names) is not None


def _opener_for(names: list[str]) -> Opener | None:
    return next(
        (
            one
            for one in OPENERS.values()
            if _matching(names, one.files) and not _matching(names, one.unless)
        ),
        None,
    )


def _open_repository(address: HubAddress) -> Checkpoint:
    # Nobody who opens a local folder waits for the import of what sends requests.
    from llamaconv.checkpoint import hub

    repository = hub.connect(address)
    weights = matching(repository, "*.safetensors")
    if weights or repository.is_file(INDEX):
        _refuse_lookalikes(repository.path, weights)
        json_files = [name for name in huggingface.JSON_FILES if repository.is_file(name)]
        repository.fetch(weights, json_files)
        return huggingface.open_repository(repository)
    pinned = HubAddress(address.repo, repository.commit)
    for kind, (files, patterns) in _MUST_BE_LOCAL.items():
        if found := _matching(repository.files, files):
            raise RefusedError(
                f"{repository.path}: found {kind} ({first_few(found, 2)}); from the Hub, only "
                f"headers of safetensors are read. Download it: {pinned.download(patterns)}"
            )
    raise RefusedError(
        f"{repository.path}: {_not_a_checkpoint(repository.path, repository.names())}"
    )


def _open_store(address: StoreAddress) -> Checkpoint:
    from llamaconv.checkpoint.store_folder import StoreFolder

    folder = StoreFolder(address)
    if not folder.is_one_file:
        return open_store_folder(folder)
    if not address.name.endswith(OPENERS["huggingface"].single):
        remedy = what_files_are(address.parent, [address.name])
        raise RefusedError(
            f"{address}: {remedy or 'neither a folder nor a .safetensors or .bin file'}"
        )
    folder = StoreFolder(address.parent)
    folder.fetch_headers()
    found = huggingface.open_folder(folder, address.name)
    folder.forget()
    return with_wrappers_reported(replace(found, remote=folder))


def open_store_folder(folder: StoreFolder) -> Checkpoint:
    """Open the checkpoint in a folder of a store, whatever its overlay has.

    Raises:
        RefusedError: There is none, or it cannot be read.
    """
    names = [*folder.names(), *(name for name in folder.files if "/" in name)]
    kind = next((kind for kind, one in OPENERS.items() if one is _opener_for(names)), None)
    if kind is None:
        if newest := _newest_step(folder):
            found = open_store_folder(newest)
            text = f"{folder.path}: a run; its newest complete step is taken, {newest.path}"
            return replace(found, problems=(warning(text), *found.problems))
        raise RefusedError(f"{folder.path}: {_not_a_checkpoint(folder.path, names)}")
    _refuse_lookalikes(folder.path, _matching(names, OPENERS[kind].files))
    if kind == "torch_checkpointing":
        raise RefusedError(
            f"{folder.path}: found a checkpoint of torch_checkpointing (metadata.pkl), which is read from "
            f"local folders only. Copy it here: {folder.path.download}"
        )
    folder.fetch_headers()
    if kind == "dcp":
        from llamaconv.checkpoint import dcp

        found = dcp.open_dcp(folder)
    elif kind == "meta":
        from llamaconv.checkpoint import meta

        found = meta.open_meta(folder)
    else:
        found = huggingface.open_folder(folder)
    folder.forget()
    return with_wrappers_reported(replace(found, remote=folder))


def _newest_step(run: StoreFolder) -> StoreFolder | None:
    """Return the newest step with a checkpoint in the folder of a run, or in its ``checkpoint``."""
    steps = runs.names_of_steps(run.names())
    if not steps and runs.FOLDER in run.names() and not run.is_file(runs.FOLDER):
        run = run.inside(runs.FOLDER)
        steps = runs.names_of_steps(run.names())
    folders = (run.inside(name) for name in steps if not run.is_file(name))
    return next((one for one in folders if _opener_for(one.names())), None)


_SMALL_FILES = [pattern for pattern in SAFETENSORS if "safetensors" not in pattern]
# What opens from a local folder only: patterns that recognise it, and patterns to download.
_MUST_BE_LOCAL = {
    "a distributed checkpoint": (
        OPENERS["dcp"].files,
        [".metadata", "*.distcp", *_SMALL_FILES],
    ),
    "a checkpoint of torch_checkpointing": (
        OPENERS["torch_checkpointing"].files,
        ["*.pkl", "*_[0-9]*", *_SMALL_FILES],
    ),
    "weights of torch.save": (["pytorch_model*.bin"], ["pytorch_model*", *_SMALL_FILES]),
    "Meta's original files": (
        OPENERS["meta"].files,
        ["original/*", "consolidated.*.pth", *_SMALL_FILES],
    ),
}


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _not_a_checkpoint(path: Path | RemoteFile, names: Collection[str]) -> str:
    if known := what_files_are(path, names):
        return known
    found = first_few(sorted(name for name in names if "/" not in name)) or "nothing"
    return (
        f"not a checkpoint: found {found}, but no *.safetensors, pytorch_model*.bin, "
        "consolidated.*.pth, .metadata or metadata.pkl, and no other .pt, .pth or .bin with the names of a Llama"
    )
