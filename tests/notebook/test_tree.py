"""The tree of notebook 1: folded without a kernel, searched with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import checkpoints

from llamaconv import open_checkpoint
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.notebook.panels import browse as panels
from llamaconv.notebook.tree import tree


@pytest.fixture
def checkpoint(source: Path) -> Checkpoint:
    return open_checkpoint(source)


def test_tree_folds_by_module_and_layer_in_the_order_of_a_forward_pass(
    checkpoint: Checkpoint,
) -> None:
    found = tree(checkpoint)
    shown = found._repr_html_()
    assert shown.count("<details>") == shown.count("</details>") == 2 + 12 * 3
    assert "<details open>" not in shown
    model, head = found.top
    assert (model.n_tensors, head.text().split(" ")[0]) == (110, "lm_head.weight")
    assert list(model.children["layers."].children) == [f"{n}." for n in range(12)]
    assert model.n_bytes + head.n_bytes == checkpoint.total_bytes


def test_search_unfolds_what_it_finds_and_shortens_chains(checkpoint: Checkpoint) -> None:
    found = tree(checkpoint, "Layers.3 q_proj")
    assert found.caption == "1 of 111 tensors" and found.opened
    assert found.top[0].label == "model.layers.3.self_attn.q_proj.weight"
    assert tree(checkpoint, "q_proj")._repr_html_().count("<details open>") == 1
    assert not tree(checkpoint, "nothing").top
    few = tree(checkpoint, most=5)
    assert "111 of 111 tensors, of which 5 are shown" in repr(few)


def test_names_from_files_are_escaped_and_bounded(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    weights = {evil: torch.ones(2), "a." * 3000 + "b": torch.ones(2), "a": torch.ones(1)}
    shown = tree(open_checkpoint(checkpoints.write(tmp_path / "hf", weights, shards=1)))
    assert evil not in shown._repr_html_() and "&lt;img" in shown._repr_html_()
    assert max(map(len, repr(shown).splitlines())) < 300


def test_panels_search_the_tree_and_read_the_chosen_tensor(checkpoint: Checkpoint) -> None:
    panel = panels.tree(checkpoint)
    panel.widget()
    panel.widgets["text"].value = "norm"
    assert "25 of 111 tensors" in panel.output.value
    values = panels.histogram(checkpoint)
    values.widget()
    values.widgets["tensor"].value = "model.norm.weight"
    assert "values of model.norm.weight are" in values.output.value
