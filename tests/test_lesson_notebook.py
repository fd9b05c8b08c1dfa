"""Notebook 3 as people use it: its panels driven from Python, and headless on other folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import headless
import nbformat
import papermill
import pytest
import torch

from llamaconv import figures, lesson, rope, sample_path
from llamaconv.convert import Conversion
from llamaconv.panels import Panel
from llamaconv.panels import lesson as panels

NOTEBOOK = headless.NOTEBOOKS / "3-rope-layouts.ipynb"


def test_it_runs_on_another_checkpoint_with_heads_and_vocabulary_of_its_own(
    tmp_path: Path, source: Path
) -> None:
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}", seconds=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "12 layers of width 64, 8 heads of 8, 2 kv heads" in text
    assert "nats a token" in text
    assert f"-p source {source}" in text


def test_it_runs_with_controls_on_as_many_kv_heads_as_heads_and_on_interleaved_rows(
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
    assert text.count("application/vnd.jupyter.widget-view+json") == len(PANELS)


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("sorce=/data", "unknown parameter 'sorce'; did you mean 'source'?"),
        ("source=/nowhere", "/nowhere: is not there"),
        ("source=hf://some/model", "hf://some/model: the lesson runs the model"),
    ],
)
def test_a_wrong_parameter_or_source_fails_with_the_reason_as_the_last_line(
    tmp_path: Path, parameter: str, reason: str
) -> None:
    done = headless.run(NOTEBOOK.name, tmp_path, parameter, seconds=300)
    assert done.returncode != 0
    assert reason in [line for line in done.stderr.splitlines() if line.strip()][-1]


def test_its_parameters_are_a_source_and_whether_to_show_controls() -> None:
    assert set(papermill.inspect_notebook(str(NOTEBOOK))) == {"source", "interactive"}


def test_it_teaches_in_the_rhythm_of_the_house() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) > 2 * len(code), "more prose than code"
    lines = sorted(len(cell.source.splitlines()) for cell in code)
    assert lines[len(lines) // 2] <= 3
    assert any("<img" in str(cell.get("outputs")) for cell in cells[:5])
    prose = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert prose.count("<details>") == prose.count("</details>") > 5


SPECIMEN = lesson.open_specimen(sample_path())
PANELS: dict[str, tuple[Panel, dict[str, object]]] = {
    "turning pairs": (panels.turning_pairs(SPECIMEN), {"position": 20}),
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
def test_the_followed_row_goes_where_the_converter_puts_it(row: int) -> None:
    order = rope.half_split_to_interleaved(torch.arange(32), 1).tolist()
    place, beside = order.index(row), order.index((row + 16) % 32)
    words = figures.follow_row(row).alt
    assert f"row {row} goes from place {row} to place {place}, its partner" in words
    assert f"to {beside}, beside it" in words
    assert abs(place - beside) == 1


def test_the_same_choice_gives_the_same_bytes() -> None:
    for panel, _ in PANELS.values():
        assert panel.static()._repr_html_() == panel.static()._repr_html_()


def test_a_panel_fits_a_small_checkpoint_of_few_layers_and_heads(tmp_path: Path) -> None:
    params = replace(checkpoints.GQA, n_layers=1, n_heads=1, n_kv_heads=1)
    folder = checkpoints.write_model(tmp_path / "one", params)
    specimen = lesson.open_specimen(folder)
    assert "layer 0, head 0" in panels.attention_maps(specimen).static()._repr_html_()
