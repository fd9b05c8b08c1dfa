"""The comparison of notebook 5: of two checkpoints, or of one with a copy that was damaged."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.notebook.conversion import progress_bar
from llamaconv.notebook.damage import DAMAGES, MOST_BYTES
from llamaconv.report.tables import Sentence, size
from llamaconv.verify.compare import compare_checkpoints
from llamaconv.verify.compared import Compared
from llamaconv.verify.layers import run_layers
from llamaconv.verify.layers_run import LayersRun
from llamaconv.verify.sides import open_sides

MOST_BYTES_TO_RUN = 20_000_000_000
"""Bytes of the larger side that is run from a cell, which takes minutes."""


@contextmanager
def _paths(source: str | Path, target: str | Path, other: str) -> Iterator[tuple[str | Path, Path]]:
    """Yield what is compared; a damaged copy is deleted afterwards."""
    if other or open_checkpoint(target).total_bytes > MOST_BYTES:
        yield source, Path(other or target).expanduser()
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(target, Path(folder) / "copy"))
        for damage in DAMAGES.values():
            damage(copy)
        yield source, copy


def compare_with(source: str | Path, target: str | Path, other: str) -> Compared:
    """Compare ``source`` with ``other``; if that is empty, with a damaged copy of ``target``.

    The copy has all of `DAMAGES`. A target above `MOST_BYTES` is not copied, and compared as it is.

    Args:
        source: A checkpoint of any format.
        target: The checkpoint that it was converted to, which is not changed.
        other: The other checkpoint, such as a later step of the same run.

    Raises:
        RefusedError: The two cannot be compared, as of `compare_checkpoints`.
        FailedError: A file cannot be read.
    """
    with _paths(source, target, other) as paths, progress_bar("read") as bar:
        return compare_checkpoints(*paths, bar)


def run_with(source: str | Path, target: str | Path, other: str) -> LayersRun | Sentence:
    """Run the two sides of `compare_with`, which has the same arguments and errors.

    Sides above `MOST_BYTES_TO_RUN` are not run, and the result says how to.
    """
    with _paths(source, target, other) as paths, progress_bar("read") as bar:
        sides, _ = open_sides(*paths)
        n_bytes = max(side.checkpoint.total_bytes for side in sides)
        if n_bytes > MOST_BYTES_TO_RUN:
            return Sentence(
                f"Not run: {size(n_bytes)}. llamaconv compare A B --run takes its time."
            )
        return run_layers(sides, bar)
