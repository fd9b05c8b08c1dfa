"""The conversions that notebooks 4 and 5 run from a cell. Limit: imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.convert.convert import convert_checkpoint
from llamaconv.notebook.cell_bar import CellBar
from llamaconv.plan.planner import make_plan
from llamaconv.report.errors import printable
from llamaconv.report.progress import Progress
from llamaconv.report.tables import Table, size


def progress_bar(*steps: str) -> CellBar:
    """Return a context manager that shows progress under the cell, in one place.

    Args:
        steps: The steps of the work; those of a conversion by default.
    """
    return CellBar(steps or ("write", "verify"))


def disk_needed(source: str | Path, target: Path) -> Table:
    """Return the bytes that notebook 5 will write, and those that are free.

    Args:
        source: A checkpoint, as for `open_checkpoint`.
        target: The folder to check, which is written if it does not exist.

    Raises:
        RefusedError: The source cannot be opened.
    """
    start = open_checkpoint(source)
    copies = start.total_bytes
    missing = 0 if target.exists() else make_plan(start).bytes_to_write
    parents = (one for one in target.absolute().parents if one.is_dir())
    free = shutil.disk_usage(next(parents)).free
    enough = "yes" if free > missing + copies else "no: free some, or choose another target"
    rows = [
        ("the target", size(missing) if missing else "exists already"),
        ("the round trip, deleted after it", size(copies)),
        ("free where the target is", size(free)),
        ("enough", enough),
    ]
    return Table(("this notebook writes", ""), rows, right=("",))


def write_if_missing(source: str | Path, target: Path, progress: Progress | None = None) -> str:
    """Convert ``source`` to ``target`` with the default options, unless ``target`` exists.

    Args:
        source: A checkpoint, as for `open_checkpoint`.
        target: The folder to write.
        progress: As for `convert_checkpoint`.

    Returns:
        A sentence that says which of the two happened.

    Raises:
        RefusedError: The source cannot be converted.
        FailedError: The conversion failed.
    """
    if target.exists():
        return printable(f"{target} exists: it is checked as it is")
    plan = make_plan(open_checkpoint(source))
    convert_checkpoint(plan, target, progress=progress)
    return printable(f"{target} did not exist: converted from the source to {plan.target}")
