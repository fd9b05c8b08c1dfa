"""The plan from all sides: filters, problems, other targets, flavours, and the rows of one tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import headless
import papermill
import pytest
import torch

from llamaconv import RefusedError, Target, figures, keys, make_plan, open_checkpoint, preview
from llamaconv import sample_path as sample
from llamaconv.convert import Conversion
from llamaconv.panels import preview as panels
from llamaconv.plan import Plan
from llamaconv.sample_rows import COLUMNS, sample_rows
from llamaconv.titan import FLAVOURS

NOTEBOOK = headless.NOTEBOOKS / "2-preview-keys.ipynb"
Q = "layers.3.attention.qkv_linear.wq.weight"
K = "layers.3.attention.qkv_linear.wk.weight"


def plan_of(folder: Path, **options: object) -> Plan:
    return make_plan(open_checkpoint(folder), Target(**options))  # type: ignore[arg-type]


# Moves and problems.


def test_the_filters_leave_what_fits_all_of_them(source: Path) -> None:
    plan = plan_of(source)
    assert preview.moves(plan).rows == plan.table().rows
    reordered = preview.moves(plan, "reorder").rows
    assert len(reordered) == 24 and {row[2] for row in reordered} == {"reorder"}
    assert [row[1] for row in preview.moves(plan, "reorder", 3).rows] == [Q, K]
    assert [row[1] for row in preview.moves(plan, "reorder", 3, " K_Proj").rows] == [K]
    outside = [row[1] for row in preview.moves(plan, layer=preview.NO_LAYER).rows]
    assert outside == ["tok_embeddings.weight", "norm.weight", "lm_head.weight"]
    assert preview.moves(plan, text="no such name").rows == []


def test_every_problem_is_shown_errors_first_and_nothing_is_raised(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    del weights["model.layers.5.mlp.up_proj.weight"]
    source = checkpoints.write(tmp_path / "bent", weights, hidden_act="gelu")
    plan = plan_of(source, rope="half_split")
    shown = preview.problems(plan)
    levels = [row[0] for row in shown.rows]
    assert levels == sorted(levels) and set(levels) == {"error", "warning"}
    assert "hidden_act is 'gelu'" in str(shown) and "layers.5.mlp.up_proj" in str(shown)
    assert "nothing would be written" in shown.caption
    assert len(preview.moves(plan, most=200).rows) == len(plan.moves) == 110


def test_without_problems_it_says_so(source: Path) -> None:
    assert "no problems" in str(preview.problems(plan_of(source)))


# Another target.


def test_other_names_and_dtype_are_told_kind_by_kind_with_the_bytes(source: Path) -> None:
    plan = plan_of(source)
    other = plan_of(source, generation="titan-0.2", dtype="float32")
    rows = {(row[0], row[1]): row[2:] for row in preview.changes(plan, other).rows}
    assert rows["target key", "wk"] == (
        "layers.N.attention.qkv_linear.wk.weight",
        "layers.N.attention.wk.weight",
        12,
    )
    assert rows["dtype", "all"] == ("bfloat16", "float32", 111)
    assert rows["operation", "all but wq, wk"] == ("copy", "cast", 87)
    assert ("target key", "wo") not in rows
    before, after, count = rows["bytes to write", "all"]
    assert (before, after, count) == ("712 kB", "1.42 MB", 111)


def test_a_plan_against_itself_differs_in_nothing(source: Path) -> None:
    shown = preview.changes(plan_of(source), plan_of(source))
    assert [row[0] for row in shown.rows] == ["bytes to write"]
    assert "the same options" in shown.caption


def test_a_head_that_the_target_does_not_store_is_told(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    del weights["lm_head.weight"]
    source = checkpoints.write(tmp_path / "tied", weights, tie_word_embeddings=True)
    rows = preview.changes(plan_of(source), plan_of(source, to="hf")).rows
    assert ("operation", "output", "tie", "not written", 1) in rows


# Names and flavours.


@pytest.mark.parametrize("role", keys.ROLES)
def test_the_glossary_is_the_table_of_keys(role: str) -> None:
    found = dict(preview.names(role, checkpoints.GQA).rows)
    assert found["Hugging Face"] == keys.ROLES[role].names["huggingface"]
    assert found["TorchTitan 0.3"] in (keys.ROLES[role].names["titan-0.3"], "has no place for it")
    assert found["shape"] == " × ".join(keys.ROLES[role].axes)


def test_the_nearest_flavour_is_the_one_that_fits(source: Path) -> None:
    plan = plan_of(source)
    for flavour in FLAVOURS:
        params = preview.flavour_params(flavour)
        assert flavour.fits(params)
        assert preview.nearest_flavour(replace(plan, params=params)) == flavour.name
    assert preview.nearest_flavour(replace(plan, params=None)) in {f.name for f in FLAVOURS}


def test_a_model_of_a_flavours_shapes_differs_in_dtype_only(tmp_path: Path) -> None:
    debug = next(flavour for flavour in FLAVOURS if flavour.name == "debugmodel")
    params = preview.flavour_params(debug)
    source = checkpoints.write_model(tmp_path / "debug", params, rope_scaling=None)
    shown = preview.against_flavour(plan_of(source), "debugmodel")
    assert [row[0] for row in shown.rows] == ["dtype", "in no tensor"]
    assert shown.rows[1][1:4] == ("RoPE scaling", "none", "factor 8")
    assert shown.caption.startswith("0 tensors differ")


def test_shapes_and_layers_that_a_flavour_has_otherwise_are_counted(source: Path) -> None:
    shown = preview.against_flavour(plan_of(source, dtype="float32"), "debugmodel")
    rows = {(row[0], row[1]): row[2:] for row in shown.rows}
    assert rows["shape", Q.replace("3", "N", 1)] == ("64 × 64", "256 × 256", 6)
    # The flavour has six layers, this model twelve.
    assert rows["presence", "layers.N.attention_norm.weight"] == ("64", "absent", 6)
    assert "dtype" not in {row[0] for row in shown.rows}


def test_a_flavour_that_is_none_is_refused(source: Path) -> None:
    with pytest.raises(RefusedError, match="flavour '9B'; one of 1B, 3B, 8B"):
        preview.against_flavour(plan_of(source), "9B")


def test_free_disk_is_that_of_the_nearest_folder_there_is(source: Path, tmp_path: Path) -> None:
    rows = dict(preview.disk(plan_of(source), tmp_path / "not" / "yet").rows)
    assert rows["needed"] == "712 kB" and rows["enough"] == "yes"


# One tensor.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "generation": "titan-0.2"},
        {"rope": "half_split", "dtype": "float16"},
    ],
)
def test_the_target_rows_are_those_of_a_finished_conversion(
    source: Path,
    convert: Callable[..., Conversion],
    load_dcp: Callable[[Path], dict[str, torch.Tensor]],
    options: dict[str, str],
) -> None:
    plan = convert(source, verified=False, **options).plan
    written = load_dcp(source.parent / "target")
    for move in plan.written:
        for head in range(move.heads or 1):
            found = sample_rows(plan, move.writes, head)
            rows = written[move.writes][found.first : found.first + len(found.order)].double()
            assert torch.equal(found.target, rows.view(len(rows), -1)[:, :COLUMNS])


def test_order_names_the_source_row_of_each_target_row(source: Path) -> None:
    found = sample_rows(plan_of(source), K, 1)
    assert found.first == 8 and found.order == (0, 4, 1, 5, 2, 6, 3, 7)
    assert torch.equal(found.target, found.source[list(found.order)])


def test_only_the_rows_that_are_shown_are_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    read = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda *given: lengths.append(sum(map(len, given[1]))) or read(*given)
    )
    sample_rows(plan_of(source), Q, 2)
    # One head of 8 rows, 64 bfloat16 each: once for the source, once by the engine.
    assert lengths == [8 * 64 * 2] * 2


@pytest.mark.parametrize(
    ("key", "head", "reason"),
    [
        ("lm_head.bias", 0, "the plan writes no such tensor"),
        (K, 2, "head 2; it has heads 0 to 1"),
    ],
)
def test_what_is_not_there_is_refused(source: Path, key: str, head: int, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        sample_rows(plan_of(source), key, head)


def test_rows_that_are_not_heads_and_bytes_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    name = "model.layers.3.self_attn.k_proj.weight"
    weights[name] = weights[name][:15].contiguous()
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    plan = plan_of(checkpoints.write(tmp_path / "bent", weights))
    with pytest.raises(RefusedError, match="15 rows are not 2 heads"):
        sample_rows(plan, K)
    with pytest.raises(RefusedError, match="stored as int8"):
        sample_rows(plan, "norm.weight")
    assert 'role="alert"' in panels.one_tensor(plan, K).static()._repr_html_()


def test_a_source_that_goes_between_plan_and_look_is_said(source: Path) -> None:
    plan = plan_of(source)
    panel = panels.one_tensor(plan, K)
    for file in source.glob("*.safetensors"):
        file.unlink()
    assert "has gone since it was opened" in panel.static()._repr_html_()


# Pictures.


def test_the_pictures_say_what_they_show(source: Path) -> None:
    plan = plan_of(source)
    assert "reorder 24 tensors" in figures.operations(plan).alt
    assert "wq and wk only" in figures.operations(plan).alt
    assert "Re-ordered are none" in figures.operations(plan_of(source, rope="half_split")).alt
    assert "6 of 8 rows" in figures.sample_rows(sample_rows(plan, Q)).alt
    assert "at its place" in figures.sample_rows(sample_rows(plan, "norm.weight")).alt
    cast = sample_rows(plan_of(source, dtype="float16"), Q)
    assert "cast to float16" in figures.sample_rows(cast).alt


def test_the_way_back_is_drawn_with_its_own_partners(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    made = convert(source, verified=False)
    plan = plan_of(made.target, to="hf")
    found = sample_rows(plan, "model.layers.3.self_attn.k_proj.weight")
    assert found.order == (0, 2, 4, 6, 1, 3, 5, 7)
    assert "6 of 8 rows" in figures.sample_rows(found, row=3).alt


def test_a_plan_of_nothing_is_a_picture_too(source: Path) -> None:
    empty = replace(plan_of(source), moves=())
    assert "nothing" in figures.operations(empty).alt
    for panel in (panels.moves(empty), panels.one_tensor(empty), panels.flavours(empty)):
        assert panel.static()._repr_html_()
        panel.show(interactive=True)


# Panels, driven from Python.


def test_the_moves_are_filtered_by_the_controls(source: Path) -> None:
    panel = panels.moves(plan_of(source))
    panel.show(interactive=True)
    assert panel.output.value == panel.static()._repr_html_()
    assert "24 of 111 moves" in panel.output.value
    panel.widgets["layer"].value = 3
    assert "2 of 111 moves" in panel.output.value and K in panel.output.value
    panel.widgets["operation"].value = preview.ALL
    panel.widgets["text"].value = "down_proj"
    assert "1 of 111 moves" in panel.output.value


def test_each_choice_of_a_target_is_a_real_plan(source: Path) -> None:
    panel = panels.other_target(plan_of(source))
    panel.show(interactive=True)
    assert "the same options" in panel.output.value
    for name in ("to", "generation", "rope", "dtype"):
        for value in panel.widgets[name].options:
            panel.widgets[name].value = value
            target = Target(**{one: widget.value for one, widget in panel.widgets.items()})
            plan = make_plan(open_checkpoint(source), target)
            assert plan.cost()._repr_html_() in panel.output.value
            assert preview.problems(plan)._repr_html_() in panel.output.value


def test_glossary_flavour_and_tensor_follow_their_controls(source: Path) -> None:
    plan = plan_of(source)
    for panel, name, value, words in (
        (panels.glossary(plan), "role", "w2.bias", "has no place for it"),
        (panels.flavours(plan), "flavour", "405B", "16384 × 16384"),
        (panels.one_tensor(plan), "key", "lm_head.weight", "first 16 rows of lm_head.weight"),
        (panels.one_tensor(plan), "head", 1, "rows 8 to 15"),
        (panels.one_tensor(plan), "head", 5, "head 5; it has heads 0 to 1"),
    ):
        panel.show(interactive=True)
        assert words not in panel.output.value
        panel.widgets[name].value = value
        assert words in panel.output.value


def test_the_row_to_follow_changes_the_picture(source: Path) -> None:
    panel = panels.one_tensor(plan_of(source))
    panel.show(interactive=True)
    before = panel.output.value
    panel.widgets["row"].value = 5
    assert panel.output.value != before
    still = panels.one_tensor(plan_of(source, rope="half_split"))
    still.show(interactive=True)
    assert (still.widgets["row"].min, still.widgets["row"].max) == (0, 0)


# Torch, and headless.


def test_all_but_one_tensor_is_looked_at_without_torch() -> None:
    script = f"""
from pathlib import Path
from llamaconv import figures, make_plan, open_checkpoint, preview
from llamaconv.panels import preview as panels
plan = make_plan(open_checkpoint(Path({str(sample())!r})))
one = panels.one_tensor(plan)
for panel in (panels.moves, panels.other_target, panels.glossary, panels.flavours):
    panel(plan).show(True)
figures.operations(plan), preview.problems(plan), preview.disk(plan, ".")
import sys
assert "torch" not in sys.modules
one.static()
assert "torch" in sys.modules, "the test can fail"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs_with_other_options_and_with_controls(tmp_path: Path) -> None:
    done = headless.run(
        NOTEBOOK.name, tmp_path, "dtype=float32", "generation=titan-0.2", "interactive=yes"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "-p generation titan-0.2 -p dtype float32" in text
    assert "bfloat16 to float32" in text and "layers.0.attention.wk.weight" in text


def test_a_source_with_problems_is_shown_to_the_end_and_fails_there(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", num_key_value_heads=4, hidden_act="gelu")
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}")
    assert done.returncode != 0
    assert "hidden_act is 'gelu'" in done.stderr
    assert "shape [16, 64], [32, 64] expected" in done.stderr
    ran = (tmp_path / "run.ipynb").read_text()
    assert "llamaconv plan" in ran, "all but the last cell ran"


def test_every_parameter_can_be_inspected() -> None:
    assert set(papermill.inspect_notebook(str(NOTEBOOK))) == {
        *("source", "to", "generation", "rope", "dtype", "shards"),
        *("max_shard_size", "assets", "tie", "interactive"),
    }
