"""The comparison of notebook 5, and its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llamaconv.convert.convert import Conversion
from llamaconv.notebook import figures
from llamaconv.notebook.comparison import compare_with, run_with


def test_empty_other_shows_both_damages_and_leaves_the_target_alone(
    convert: Callable[..., Conversion], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert(source, "target").target
    compared = compare_with(source, target, "")
    assert [pair.role for pair in compared.different] == ["wq", "w2"]
    assert compare_with(source, target, str(target)).equal
    monkeypatch.setattr("llamaconv.notebook.comparison.MOST_BYTES", 1)
    assert compare_with(source, target, "").equal, "too large to copy"


def test_picture_states_the_largest_difference_and_draws_what_is_not_finite(
    convert: Callable[..., Conversion], source: Path
) -> None:
    compared = compare_with(source, convert(source, "target").target, "")
    shown = [pair for pair in compared.pairs if pair.layer in (None, 0)]
    compared = replace(compared, pairs=tuple(shown))
    alt = figures.differences(compared).alt
    assert alt.startswith("2 of 12 tensors differ.") and "layers.0.self_attn.q_proj" in alt
    worst, *rest = compared.pairs
    broken = replace(worst, n_different=1, relative=float("inf"))
    other = replace(rest[0], reason="other shape")
    drawn = figures.differences(replace(compared, pairs=(broken, other, *rest[1:])))
    assert "other shape" in drawn.alt and drawn.png.startswith(b"\x89PNG")
    equal = replace(compared, pairs=tuple(p for p in compared.pairs if not p.differs))
    assert figures.differences(equal).alt.startswith("No value differs")


def test_first_layer_that_diverges_is_the_damaged_one(
    convert: Callable[..., Conversion], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert(source, "target").target
    assert "diverges is: layer 0" in str(run_with(source, target, ""))
    assert "no layer diverges" in str(run_with(source, target, str(target)))
    monkeypatch.setattr("llamaconv.notebook.comparison.MOST_BYTES_TO_RUN", 1)
    assert "compare A B --run" in str(run_with(source, target, ""))
