"""Notebook 3 as people use it: its panels driven from Python, and headless on other folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints, headless

from llamaconv import sample_path
from llamaconv.convert.convert import Conversion
from llamaconv.model import rope
from llamaconv.notebook import figures, lesson
from llamaconv.notebook.panels import Panel
from llamaconv.notebook.panels import lesson as panels

NOTEBOOK = headless.NOTEBOOKS / "3-rope-layouts.ipynb"


@pytest.mark.thorough
def test_notebook_runs_on_a_checkpoint_with_other_heads_and_vocabulary(
    tmp_path: Path,
) -> None:
    params = replace(checkpoints.GQA, n_layers=2)
    source = checkpoints.write_model(tmp_path / "source", params)
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}", seconds=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "2 layers of width 64, 8 heads of 8, 2 kv heads" in text
    assert "nats per token" in text
    assert f"-p source {source}" in text


@pytest.mark.thorough
def test_notebook_runs_with_controls_on_equal_heads_and_interleaved_rows(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    params = replace(checkpoints.GQA, n_layers=2, n_kv_heads=8)
    folder = checkpoints.write_model(tmp_path / "mha", params)
    convert(folder, "meta", verified=False, to="meta")
    done = headless.run(
        NOTEBOOK.name, tmp_path, f"source={tmp_path / 'meta'}", "interactive=yes", seconds=300
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "2 layers of width 64, 8 heads of 8, 8 kv heads" in text
    # Attention is left out, since the weights are random, and scaling has a notebook of its own.
    assert text.count("application/vnd.jupyter.widget-view+json") == len(PANELS) - 2


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("sorce=/data", "unknown parameter 'sorce'; did you mean 'source'?"),
        ("source=/nowhere", "/nowhere: not found"),
        ("source=hf://some/model", "hf://some/model: the lesson runs the model"),
    ],
)
def test_invalid_parameter_or_source_fails_with_the_reason_as_the_last_line(
    tmp_path: Path, parameter: str, reason: str
) -> None:
    done = headless.run(NOTEBOOK.name, tmp_path, parameter, seconds=300)
    assert done.returncode != 0
    assert reason in [line for line in done.stderr.splitlines() if line.strip()][-1]


SPECIMEN = lesson.open_specimen(sample_path())
PANELS: dict[str, tuple[Panel, dict[str, object]]] = {
    "rotated pairs": (panels.rotated_pairs(SPECIMEN), {"position": 20}),
    "followed row": (panels.followed_row(), {"row": 5}),
    "score maps": (panels.score_maps(SPECIMEN), {"head": 6}),
    "attention": (panels.attention_maps(SPECIMEN), {"layer": 3, "head": 7}),
    "scaling": (panels.scaling_mismatch(), {"trained": "Llama 3", "run": "Llama 3.2"}),
}


@pytest.mark.parametrize("name", PANELS)
def test_each_control_changes_the_picture_and_its_words(name: str) -> None:
    panel, choices = PANELS[name]
    panel.show(interactive=True)
    assert panel.output.value == panel.static()._repr_html_()
    assert set(choices) == set(panel.widgets)
    for control, value in choices.items():
        before = panel.output.value
        assert panel.widgets[control].description
        panel.widgets[control].value = value
        assert panel.output.value != before
        assert 'role="alert"' not in panel.output.value
    assert " alt=" in panel.output.value


@pytest.mark.parametrize("row", [0, 1, 5, 15, 16, 17, 31])
def test_followed_row_goes_where_the_converter_moves_it(row: int) -> None:
    order = rope.half_split_to_interleaved(torch.arange(32), 1).tolist()
    place, beside = order.index(row), order.index((row + 16) % 32)
    words = figures.follow_row(row).alt
    assert f"row {row} goes from place {row} to place {place}, its partner" in words
    assert f"to {beside}, next to it" in words
    assert abs(place - beside) == 1


def test_panel_of_a_model_with_one_layer_and_head_shows_it(tmp_path: Path) -> None:
    params = replace(checkpoints.GQA, n_layers=1, n_heads=1, n_kv_heads=1)
    folder = checkpoints.write_model(tmp_path / "one", params)
    specimen = lesson.open_specimen(folder)
    assert "layer 0, head 0" in panels.attention_maps(specimen).static()._repr_html_()
