"""What a path that is one step off probably means: the folder inside, the folder around, the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llamaconv.checkpoint.hub_address import repository_meant
from llamaconv.report.errors import first_few

# dump/checkpoint/step-N is two folders down, a snapshot in the Hub's cache three.
_DEPTH = 3
_MOST_FOLDERS = 1000
# Accelerate saves the optimizer as a checkpoint of its own, next to the model's.
_OPTIMIZER = re.compile(r"optim(?:izers?)?(?:_\d+)?")


def for_nothing(path: Path) -> str:
    """Return the remedy for a path that does not exist, or ""."""
    meant = repository_meant(str(path))
    return f". For the repository on the Hub, use {meant}" if meant else ""


def checkpoints_in(path: Path, is_checkpoint: Callable[[Path], bool]) -> list[Path]:
    """Return the folders below ``path`` that look like a checkpoint, the newest first."""
    inside = [
        folder
        for folder in _folders_in(path)
        if is_checkpoint(folder) and not _OPTIMIZER.fullmatch(folder.name)
    ]
    return sorted(inside, key=lambda folder: _newest_first(folder.relative_to(path)))


def for_folder(path: Path, inside: list[Path]) -> str:
    """Return the remedy for a folder that is not a checkpoint; ``inside`` are those in it."""
    if not inside:
        return ""
    if len(inside) == 1:
        return f"it contains the checkpoint {inside[0]}. Give that folder"
    names = first_few([str(folder.relative_to(path)) for folder in inside], 3)
    around = {folder.parent for folder in inside}
    every = f"; to convert each, give {around.pop()} with --every-step" if len(around) == 1 else ""
    return (
        f"it contains {len(inside)} checkpoints ({names}). Give one of them, such as {inside[0]}"
        f"{every}"
    )


def for_file(path: Path, is_checkpoint: Callable[[Path], bool]) -> str:
    """Return the remedy for a file that is part of a checkpoint, or ""."""
    for folder in list(path.parents)[:2]:
        if is_checkpoint(folder):
            return f"it is a file of the checkpoint {folder}. Give the folder"
    return ""


def _folders_in(path: Path) -> Iterator[Path]:
    """Yield the folders below ``path`` breadth first; links are followed at most `_DEPTH` deep."""
    level, n_seen = [path], 0
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    below += sorted(Path(entry.path) for entry in entries if entry.is_dir())
            except OSError:
                continue
        for folder in below:
            n_seen += 1
            if n_seen > _MOST_FOLDERS:
                return
            yield folder
        level = below


def _newest_first(folder: Path) -> tuple[bool, list[int], str]:
    """Sort ``step-1000`` before ``step-500``, and folders without a number last."""
    numbers = [-int(number) for number in re.findall(r"\d+", str(folder))]
    return not numbers, numbers, str(folder)
