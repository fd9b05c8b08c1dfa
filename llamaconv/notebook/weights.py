"""The values of weights, for notebook 1: a histogram of one tensor, statistics of all.

Limit: imports torch, and reads weights.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from llamaconv.checkpoint import weight_values
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.value_statistics import (
    Histogram,
    folded_statistics,
    statistics_table,
)
from llamaconv.notebook.conversion import progress_bar
from llamaconv.report.errors import Problem
from llamaconv.report.progress import no_progress
from llamaconv.report.tables import Sentence, Table, size

MOST_BYTES = 64_000_000
"""Bytes of a checkpoint whose weights are all read without being asked."""

_NOT_HERE = (
    "Only headers are read from the Hub or a store. Copy the weights here to see their values."
)


def histogram(checkpoint: Checkpoint, name: str) -> Histogram | Sentence:
    """Read one tensor and count its values; or say that its weights are not here."""
    if isinstance(checkpoint.path, RemoteFile):
        return Sentence(_NOT_HERE)
    if name not in checkpoint.tensors:
        return Sentence("No tensor could be read; see the problems.")
    return weight_values.histogram(checkpoint.tensors[name])


@dataclass(frozen=True, repr=False)
class Weights:
    """The statistics of all weights: one row per role, and what is wrong with the values."""

    table: Table
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        return "\n".join([str(self.table), *map(str, self.problems)])

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(str(problem))}</li>" for problem in self.problems)
        return self.table._repr_html_() + (f"<ul>{lines}</ul>" if lines else "")


def statistics(checkpoint: Checkpoint, read_all: bool) -> Weights | Sentence:
    """Read all weights of a small checkpoint, of any if ``read_all``.

    Raises:
        FailedError: A file cannot be read.
    """
    if isinstance(checkpoint.path, RemoteFile):
        return Sentence(_NOT_HERE)
    is_small = checkpoint.total_bytes <= MOST_BYTES
    if not (read_all or is_small):
        return Sentence(
            f"Not read: {size(checkpoint.total_bytes)}. Set values = True to read all weights."
        )
    if is_small:
        found = weight_values.scan_statistics(checkpoint, no_progress)
    else:
        with progress_bar("read") as bar:
            found = weight_values.scan_statistics(checkpoint, bar)
    copies = weight_values.copies(checkpoint, found)
    odd = weight_values.odd_values(found)
    problems = weight_values.value_problems(checkpoint.path, odd)
    problems += weight_values.suspicious_values(checkpoint, found)
    return Weights(statistics_table(folded_statistics(found), copies), tuple(problems))
