"""The small files next to the weights: which ones a target gets, and which ones stay behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.folder import RemoteFolder
from llamaconv.checkpoint.huggingface import CONFIG
from llamaconv.checkpoint.tensors import Location
from llamaconv.checkpoint.untrusted.files import open_file, what_it_is
from llamaconv.checkpoint.untrusted.values import is_bare_name
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, first_few, warning

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""A folder with one of these has a tokenizer."""

TEMPLATES = "additional_chat_templates"
"""The one folder that comes along: chat templates that transformers saves by name."""

SMALL_FILES = (
    *TOKENIZERS,
    "tokenizer*.json",
    "tokenizer.model.v*",
    "*.tiktoken",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README*",
)
"""Patterns of the files that come along, with `TEMPLATES`."""

# What a target has instead, or what is nobody's to carry. Hidden files are left out as well.
_REPLACED = (
    *("config.json", "params.json", "llamaconv.json", "*.safetensors", "*.index.json"),
    *("*.bin", "*.pth", "*.distcp", "adapter_*"),
)


@dataclass(frozen=True)
class SmallFiles:
    """The small files of a conversion.

    Attributes:
        copied: The files that the target gets, by their path in it.
        problems: Files that cannot be read, and a warning about those that stay behind.
    """

    copied: dict[str, Location]
    problems: list[Problem]


def is_small_file(name: str) -> bool:
    """Return whether a file or folder of this name may come along."""
    return name == TEMPLATES or any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)


def find_small_files(folder: Path | None, source: Checkpoint, target: Target) -> SmallFiles:
    """Find the small files in ``folder``, or else where the source is, if that is not here.

    A DCP gets none of a folder, because they stay where they are. From elsewhere it gets
    them, and config.json, next to its weights, where training and the way back find them.
    """
    found: dict[str, Location] = {}
    behind: list[str] = []
    has_meta = "meta" in (source.format, target.format)
    for name, path in _candidates(folder, source.remote, has_meta):
        if name == "original" and has_meta:
            continue
        if is_small_file(name.split("/")[0]):
            found.setdefault(name, path)
        elif not any(fnmatchcase(name, pattern) for pattern in _REPLACED):
            behind.append(name)
    if target.format == "dcp":
        if folder is not None or source.remote is None:
            return SmallFiles({}, [])
        has_config = source.remote.is_file(CONFIG)
        config = {CONFIG: source.remote.path / CONFIG} if has_config else {}
        return SmallFiles({**config, **found}, [])
    problems = list(_unreadable(path for path in found.values() if isinstance(path, Path)))
    if behind and target.format != source.format:
        problems.append(
            warning(
                f"{folder or source.path}: {len(behind)} files and folders do not come along: {first_few(behind)}"
            )
        )
    if target.format == "huggingface" and source.remote is None:
        problems += _without_tokenizer(folder, source, found)
    return SmallFiles(found, problems)


def _candidates(
    folder: Path | None, repository: RemoteFolder | None, has_meta: bool
) -> Iterator[tuple[str, Location]]:
    if folder is not None:
        for place in filter(Path.is_dir, [folder, folder / "original"][: 1 + has_meta]):
            yield from _entries(place)
    elif repository is not None:
        for prefix in ["", "original/"][: 1 + has_meta]:
            yield from _entries_of(repository, prefix)


def _entries_of(repository: RemoteFolder, prefix: str) -> Iterator[tuple[str, Location]]:
    """Yield what `_entries` yields for a folder that is not here, and whose path is ``prefix``."""
    folders = set()
    for path in sorted(repository.files):
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name.startswith(".") or "/." in name:
            continue
        top, *inner = name.split("/")
        if not all(map(is_bare_name, (top, *inner))):
            continue  # it would be written elsewhere
        if not inner or (top == TEMPLATES and len(inner) == 1):
            yield name, repository.path / path
        elif top != TEMPLATES and top not in folders:
            folders.add(top)
            yield top, repository.path / top


def names_in(folder: Path | None) -> list[str]:
    """Return the small files in ``folder``."""
    entries = _entries(folder) if folder is not None and folder.is_dir() else ()
    return [name for name, _ in entries if is_small_file(name.split("/")[0])]


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            yield from (
                (f"{TEMPLATES}/{inner.name}", inner)
                for inner in sorted(path.iterdir())
                if inner.is_file()
            )
        elif not path.name.startswith("."):
            yield path.name, path


def _unreadable(paths: Iterable[Path]) -> Iterator[Problem]:
    """Yield a problem for each cause: a disk that fails makes all files unreadable at once."""
    failed: dict[str, list[Path]] = {}
    for path in paths:
        try:
            with open_file(path) as file:
                start = file.read(512)
        except OSError as error:
            failed.setdefault(error.strerror or str(error), []).append(path)
            continue
        reason = what_it_is(start) if start and not start.startswith(b"PK") else None
        if reason:
            yield Problem(f"{path}: {reason}")
    for reason, those in failed.items():
        them = "it" if len(those) == 1 else "them"
        yield Problem(
            f"{first_few(map(str, those))}: {reason}. Make {them} readable, or move {them} away"
        )


def _without_tokenizer(
    folder: Path | None, source: Checkpoint, found: dict[str, Location]
) -> Iterator[Problem]:
    if folder is None:
        yield warning(
            f"{source.path}: no folder with the model's tokenizer is known, so only "
            "config.json is written. Pass one with --assets"
        )
    elif source.format == "meta" and not any(name in TOKENIZERS for name in found):
        yield warning(f"{folder}: no tokenizer in it, so none is written. Pass one with --assets")
