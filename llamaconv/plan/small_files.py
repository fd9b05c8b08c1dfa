"""The small files next to the weights: which ones a target gets, and which ones stay behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.untrusted.files import open_file, what_it_is
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

    copied: dict[str, Path]
    problems: list[Problem]


def is_small_file(name: str) -> bool:
    """Return whether a file or folder of this name may come along."""
    return name == TEMPLATES or any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)


def find_small_files(folder: Path | None, source: Checkpoint, target: Target) -> SmallFiles:
    """Find the small files in ``folder``; a DCP gets none."""
    found: dict[str, Path] = {}
    behind: list[str] = []
    if folder is not None:
        places = [folder]
        if "meta" in (source.format, target.format):
            places.append(folder / "original")
        for place in filter(Path.is_dir, places):
            for name, path in _entries(place):
                if name == "original" and len(places) > 1:
                    continue
                if is_small_file(name.split("/")[0]):
                    found.setdefault(name, path)
                elif not any(fnmatchcase(name, pattern) for pattern in _REPLACED):
                    behind.append(name)
    if target.format == "dcp":
        return SmallFiles({}, [])
    problems = list(_unreadable(found.values()))
    if behind and target.format != source.format:
        problems.append(
            warning(
                f"{folder}: {len(behind)} files and folders do not come along: {first_few(behind)}"
            )
        )
    if target.format == "huggingface" and source.repository is None:
        problems += _without_tokenizer(folder, source, found)
    return SmallFiles(found, problems)


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
    folder: Path | None, source: Checkpoint, found: dict[str, Path]
) -> Iterator[Problem]:
    if folder is None:
        yield warning(
            f"{source.path}: no folder with the model's tokenizer is known, so only "
            "config.json is written. Pass one with --assets"
        )
    elif source.format == "meta" and not any(name in TOKENIZERS for name in found):
        yield warning(f"{folder}: no tokenizer in it, so none is written. Pass one with --assets")
