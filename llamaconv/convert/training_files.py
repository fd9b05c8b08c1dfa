"""Write ``train.sh`` and the module it needs next to a converted DCP, never over an edited file.

Each file ends in a digest of the lines above it. Later runs replace a file whose digest is right,
and leave one that was edited: they write to a new folder, NAME-train-2, and say so.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.torchtitan.advice import Advice
from llamaconv.torchtitan.script import NAME as SCRIPT

_SEAL = "# As llamaconv wrote it; once edited, it is not replaced: "


def folder_for(target: Path | StoreAddress, dump: Path | None) -> Path:
    """Return the folder of the training files of a target: NAME-train next to it.

    For a target in a store, that is a folder here.

    Args:
        target: The converted checkpoint.
        dump: TorchTitan's dump folder that holds it, if one does; the files are next to that.
    """
    home = Path(target.name) if isinstance(target, StoreAddress) else dump or target
    if home.name in ("", ".."):
        home = home.resolve()
    # TorchTitan deletes old folders of a run, all whose name has step-N somewhere.
    name = re.sub(r"step-(?=\d)", "step", home.name)
    return home.parent / f"{name}-train"


def write_training_files(advice: Advice, folder: Path) -> Advice:
    """Write the files of ``advice``, if it has any.

    Args:
        advice: What to run.
        folder: Where to write; a number is added to its name if it is taken.

    Returns:
        The advice, with the folder; or with a warning if nothing could be written, which is no
        reason to fail: the checkpoint is complete.
    """
    if not advice.files:
        return advice
    try:
        numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
        free = next(one for one in chain([folder], numbered) if _is_ours(one, advice.files))
        free.mkdir(exist_ok=True)
        for name, text in advice.files.items():
            _write(free / name, text)
    except OSError as error:
        problem = f"{error.filename or folder}: {error.strerror or error}; {SCRIPT} was not written"
        return replace(advice, warnings=(*advice.warnings, problem))
    warnings = advice.warnings
    if free != folder:
        warnings = (*warnings, f"{folder} is kept, because it was edited or is not llamaconv's")
    return replace(advice, folder=free, warnings=warnings)


def _is_ours(folder: Path, names: Mapping[str, str]) -> bool:
    """Return whether the files may be written to ``folder``: new, empty, or unedited ones of ours."""
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    there = [folder / name for name in names if os.path.lexists(folder / name)]
    if not there:
        return all(entry.name.startswith(".") for entry in folder.iterdir())
    return all(_is_unedited(path) for path in there)


def _is_unedited(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    text = path.read_bytes().decode("utf-8", "replace")
    body, found, _ = text.rpartition(_SEAL)
    return bool(found) and _sealed(body) == text


def _sealed(body: str) -> str:
    return f"{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()[:16]}\n"


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that a run that reads it sees one of the two; "" removes it."""
    if not text:
        path.unlink(missing_ok=True)
        return
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(_sealed(text))
        file.flush()
        os.fsync(file.fileno())
    if path.name == SCRIPT:
        mode = new.stat().st_mode
        new.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    new.replace(path)
