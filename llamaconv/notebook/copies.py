"""The notebooks as files: found in a checkout or in what a wheel installed, and copied to a folder.

A wheel installs them as data files, under ``share/llamaconv/notebooks`` of the environment, so that
the repository holds each once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import llamaconv
from llamaconv.report.errors import Problem, RefusedError

_INSTALLED = "share/llamaconv/notebooks"


def notebook_files() -> list[Path]:
    """Return the notebooks of this version, by name.

    Raises:
        RefusedError: They were not installed.
    """
    checkout = Path(llamaconv.__file__).parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "notebooks").is_dir():
        return sorted((checkout / "notebooks").glob("*.ipynb"))
    try:
        installed = files("llamaconv") or []
    except PackageNotFoundError:
        installed = []
    found = [
        Path(str(file.locate()))
        for file in installed
        if file.suffix == ".ipynb" and str(file.parent).endswith(_INSTALLED)
    ]
    if not found or not all(file.is_file() for file in found):
        raise RefusedError(
            "the notebooks are not installed; install llamaconv again, or take the folder "
            "notebooks/ of its repository"
        )
    return sorted(found, key=lambda file: file.name)


def write_notebooks(folder: Path) -> list[Path]:
    """Copy the notebooks to ``folder``; those that are there already and equal stay.

    Returns:
        The notebooks in ``folder``.

    Raises:
        RefusedError: A file in ``folder`` differs: it was edited or run, or is of another version.
            Names all of them; nothing was written.
        OSError: ``folder`` cannot be written.
    """
    originals = {folder / file.name: file.read_bytes() for file in notebook_files()}
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder}: a file, not a folder. Choose another folder")
    new = [path for path in originals if not path.is_symlink() and not path.exists()]
    others = [path for path in originals if path not in new]
    problems = [
        Problem(
            f"{path}: exists already, and differs: it was edited or run, or is of another version. "
            "Choose another folder, or move it away"
        )
        for path in others
        if not path.is_file() or path.read_bytes() != originals[path]
    ]
    if problems:
        raise RefusedError(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        path.write_bytes(originals[path])
    return list(originals)
