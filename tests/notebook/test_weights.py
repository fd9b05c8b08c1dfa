"""The values in notebook 1: of one tensor as a picture, of all as a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import open_checkpoint, sample_path
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.value_statistics import Histogram, Statistics
from llamaconv.notebook import figures, weights

Q = "model.layers.0.self_attn.q_proj.weight"


def test_picture_of_a_trained_matrix_says_that_it_is_a_bell() -> None:
    found = weights.histogram(open_checkpoint(sample_path()), Q)
    assert isinstance(found, Histogram)
    assert "bell-shaped around" in figures.histogram(found).alt
    flat = replace(found, counts=(5,) * 24, n_above=3)
    assert "not bell-shaped" in (alt := figures.histogram(flat).alt)
    assert "3 far from the mean" in alt
    nothing = Histogram(Statistics("x", 4, n_nan=4), -0.5, 0.5, (0,))
    assert figures.histogram(nothing).alt == "x has no finite value: 4 NaN."


def test_large_checkpoint_is_read_only_if_asked(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(source)
    found = weights.statistics(checkpoint, read_all=False)
    assert isinstance(found, weights.Weights) and len(found.table.rows) == 12
    assert not found.problems
    monkeypatch.setattr(weights, "MOST_BYTES", 1)
    assert "values = True" in str(weights.statistics(checkpoint, read_all=False))
    assert str(weights.statistics(checkpoint, read_all=True)) == str(found)


def test_what_is_wrong_with_values_is_below_the_table(tmp_path: Path) -> None:
    tensors = checkpoints.tensors()
    tensors[Q][:2] = 0
    tensors[Q][5, 5] = float("nan")
    found = weights.statistics(open_checkpoint(checkpoints.write(tmp_path / "hf", tensors)), False)
    shown = found._repr_html_()
    assert "1 NaN" in shown and f"{Q} (2 rows)" in shown
    assert "error: " in str(found) and "warning: " in str(found)


def test_repository_has_no_values_and_says_so(source: Path) -> None:
    there = replace(
        open_checkpoint(source), path=RemoteFile("hf://org/x@1", "x", "1", "hf download")
    )
    for shown in (weights.histogram(there, Q), weights.statistics(there, read_all=True)):
        assert "Only headers are read from the Hub or a store" in str(shown)
