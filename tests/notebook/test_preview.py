"""The plan from all sides: filters, problems, other targets, flavours, and the rows of one tensor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints, headless

from llamaconv import RefusedError, Target, make_plan, open_checkpoint
from llamaconv import sample_path as sample
from llamaconv.convert.convert import Conversion
from llamaconv.notebook import figures, preview
from llamaconv.notebook.panels import preview as panels
from llamaconv.notebook.sample_rows import COLUMNS, sample_rows
from llamaconv.plan.plan import Plan
from llamaconv.torchtitan.releases import FLAVOURS

NOTEBOOK = headless.NOTEBOOKS / "2-preview-keys.ipynb"
Q = "layers.3.attention.qkv_linear.wq.weight"
K = "layers.3.attention.qkv_linear.wk.weight"


def plan_of(folder: Path, **options: object) -> Plan:
    return make_plan(open_checkpoint(folder), Target(**options))  # type: ignore[arg-type]


# Moves and problems.


def test_filters_keep_moves_that_pass_all_of_them(source: Path) -> None:
    plan = plan_of(source)
    assert preview.moves(plan).rows == plan.table().rows
    reordered = preview.moves(plan, "reorder").rows
    assert len(reordered) == 24 and {row[0] for row in reordered} == {"reorder"}
    assert [row[2] for row in preview.moves(plan, "reorder", 3).rows] == [Q, K]
    assert [row[2] for row in preview.moves(plan, "reorder", 3, " K_Proj").rows] == [K]
    outside = [row[2] for row in preview.moves(plan, layer=preview.NO_LAYER).rows]
    assert outside == ["tok_embeddings.weight", "norm.weight", "lm_head.weight"]
    assert preview.moves(plan, text="no such name").rows == []


def test_moves_are_folded_by_layer_and_none_is_out_of_reach(source: Path) -> None:
    shown = preview.moves(plan_of(source), most=12)._repr_html_()
    titles = re.findall("<summary>(.*?)</summary>", shown)
    assert titles[:4] == [
        "before the layers: 1 copy",
        "layer 0: 7 copy, 2 reorder",
        "layers 1 to 11: each like layer 0",
        "layer 1: 7 copy, 2 reorder",
    ]
    assert titles[-1] == "after the layers: 2 copy" and shown.count("<details open>") == 1
    assert shown.count("<tr><td") == 111 and "more rows" not in shown
    assert shown.index(">operation<") < shown.index(">source<"), "seen in a narrow window"
    few = preview.moves(plan_of(source), layer=3, most=12)._repr_html_()
    assert "<details" not in few and few.count("<tr><td") == 9


def test_layer_that_differs_has_a_fold_of_its_own(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    del weights["model.layers.5.mlp.up_proj.weight"]
    plan = plan_of(checkpoints.write(tmp_path / "bent", weights))
    titles = re.findall("<summary>(.*?)</summary>", preview.moves(plan)._repr_html_())
    assert titles[1:7:5] == ["layer 0: 7 copy, 2 reorder", "layer 5: 6 copy, 2 reorder"]


def test_every_problem_is_shown_errors_first_and_nothing_is_raised(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    del weights["model.layers.5.mlp.up_proj.weight"]
    source = checkpoints.write(tmp_path / "bent", weights, hidden_act="gelu")
    plan = plan_of(source, rope="half_split")
    shown = preview.problem_table(plan)
    levels = [row[0] for row in shown.rows]
    assert levels == sorted(levels) and set(levels) == {"error", "warning"}
    assert "hidden_act must be 'silu' in a Llama; got 'gelu'" in str(
        shown
    ) and "layers.5.mlp.up_proj" in str(shown)
    assert "nothing would be written" in shown.caption
    assert len(preview.moves(plan, most=200).rows) == len(plan.moves) == 110


def test_problems_call_options_what_the_place_calls_them(source: Path) -> None:
    plan = plan_of(source, rope="half_split")
    assert "rope = half_split keeps" in str(preview.problem_table(plan, ("rope",)))
    assert "-p rope half_split keeps" in str(preview.problem_table(plan))


def test_plan_without_problems_is_reported_as_executable(source: Path) -> None:
    assert "no problems" in str(preview.problem_table(plan_of(source)))


# Another target.


def test_changed_names_and_dtype_are_listed_by_kind_with_the_bytes(source: Path) -> None:
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


def test_tied_head_that_is_not_stored_is_listed_as_not_written(tmp_path: Path) -> None:
    weights = checkpoints.tensors()
    del weights["lm_head.weight"]
    source = checkpoints.write(tmp_path / "tied", weights, tie_word_embeddings=True)
    rows = preview.changes(plan_of(source), plan_of(source, to="hf")).rows
    assert ("operation", "output", "tie", "not written", 1) in rows


# Names and flavours.


@pytest.mark.parametrize(
    ("role", "names", "shape"),
    [
        (
            "wk",
            ("model.layers.N.self_attn.k_proj.weight", "layers.N.attention.qkv_linear.wk.weight"),
            "kv_rows × dim",
        ),
        ("output", ("lm_head.weight", "lm_head.weight"), "vocab_size × dim"),
        ("w2.bias", ("model.layers.N.mlp.down_proj.bias", "layers.N.feed_forward.w2.bias"), "dim"),
    ],
)
def test_the_glossary_has_names_and_shape(role: str, names: tuple[str, str], shape: str) -> None:
    found = dict(preview.names(role, checkpoints.GQA).rows)
    assert (found["Hugging Face"], found["TorchTitan 0.3"]) == names
    assert found["shape"] == shape


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


def test_shapes_and_layers_that_differ_from_a_flavour_are_counted(source: Path) -> None:
    shown = preview.against_flavour(plan_of(source, dtype="float32"), "debugmodel")
    rows = {(row[0], row[1]): row[2:] for row in shown.rows}
    assert rows["shape", Q.replace("3", "N", 1)] == ("64 × 64", "256 × 256", 6)
    # The flavour has six layers, this model twelve.
    assert rows["presence", "layers.N.attention_norm.weight"] == ("64", "missing", 6)
    assert "dtype" not in {row[0] for row in shown.rows}


def test_unknown_flavour_is_refused(source: Path) -> None:
    with pytest.raises(RefusedError, match=r"one of 1B, 3B, 8B.*'9B'"):
        preview.against_flavour(plan_of(source), "9B")


def test_free_disk_is_that_of_the_nearest_existing_folder(source: Path, tmp_path: Path) -> None:
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
            found = sample_rows(plan, move.target_name, head)
            rows = written[move.target_name][found.first : found.first + len(found.order)].double()
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
        (K, 2, "no head 2; it has heads 0 to 1"),
    ],
)
def test_unknown_key_or_head_is_refused(source: Path, key: str, head: int, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        sample_rows(plan_of(source), key, head)


def test_rows_that_are_not_whole_heads_and_integer_tensors_are_refused(tmp_path: Path) -> None:
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


def test_source_deleted_after_planning_is_reported(source: Path) -> None:
    plan = plan_of(source)
    panel = panels.one_tensor(plan, K)
    for file in source.glob("*.safetensors"):
        file.unlink()
    assert "deleted since it was opened" in panel.static()._repr_html_()


# Pictures.


def test_alt_texts_state_what_the_pictures_show(source: Path) -> None:
    plan = plan_of(source)
    assert "reorder 24 tensors" in figures.operations(plan).alt
    assert "wq and wk only" in figures.operations(plan).alt
    assert "Reordered: none" in figures.operations(plan_of(source, rope="half_split")).alt
    assert "6 of 8 rows" in figures.sample_rows(sample_rows(plan, Q)).alt
    assert "keeps its place" in figures.sample_rows(sample_rows(plan, "norm.weight")).alt
    cast = sample_rows(plan_of(source, dtype="float16"), Q)
    assert "cast to float16" in figures.sample_rows(cast).alt


def test_reverse_conversion_is_drawn_with_its_own_partners(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    made = convert(source, verified=False)
    plan = plan_of(made.target, to="hf")
    found = sample_rows(plan, "model.layers.3.self_attn.k_proj.weight")
    assert found.order == (0, 2, 4, 6, 1, 3, 5, 7)
    assert "6 of 8 rows" in figures.sample_rows(found, row=3).alt


def test_empty_plan_is_drawn(source: Path) -> None:
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
    for name in ("generation", "rope", "dtype", "to"):
        for value in panel.widgets[name].options:
            panel.widgets[name].value = value
            chosen = panel.values()
            if chosen["to"] != "dcp":
                chosen |= {"generation": "titan-0.3", "rope": "interleaved"}
                assert panel.widgets["rope"].disabled and panel.widgets["generation"].disabled
            target = Target(**chosen)
            plan = make_plan(open_checkpoint(source), target)
            assert plan.cost()._repr_html_() in panel.output.value
            shown = preview.problem_table(plan, panel.controls)
            assert shown._repr_html_() in panel.output.value


def test_glossary_flavour_and_tensor_follow_their_controls(source: Path) -> None:
    plan = plan_of(source)
    for panel, name, value, words in (
        (panels.glossary(plan), "role", "w2.bias", "has no such tensor"),
        (panels.flavours(plan), "flavour", "405B", "16384 × 16384"),
        (panels.one_tensor(plan), "key", "lm_head.weight", "first 16 rows of lm_head.weight"),
        (panels.one_tensor(plan), "head", 1, "rows 8 to 15"),
    ):
        panel.show(interactive=True)
        assert words not in panel.output.value
        panel.widgets[name].value = value
        assert words in panel.output.value


def test_only_heads_and_rows_that_the_tensor_has_are_offered(source: Path) -> None:
    panel = panels.one_tensor(plan_of(source))
    panel.show(interactive=True)
    head, row, key = (panel.widgets[name] for name in ("head", "row", "key"))
    assert tuple(head.options) == (0, 1) and row.max == 7, "k"
    key.value = Q
    assert tuple(head.options) == tuple(range(8))
    head.value = 7
    key.value = K
    assert tuple(head.options) == (0, 1) and head.value == 0
    assert "rows 0 to 7" in panel.output.value
    key.value = Q.replace("wq", "wv")
    assert head.disabled and head.value == "—" and row.disabled
    assert "keep their places" in head.tooltip and "keep their places" in panel._off.value
    key.value = Q
    assert not head.disabled and head.value == 0


def test_the_row_to_follow_changes_the_picture(source: Path) -> None:
    panel = panels.one_tensor(plan_of(source))
    panel.show(interactive=True)
    before = panel.output.value
    panel.widgets["row"].value = 5
    assert panel.output.value != before
    still = panels.one_tensor(plan_of(source, rope="half_split"))
    still.show(interactive=True)
    assert still.widgets["head"].disabled and still.widgets["row"].disabled, "no rows move"


# Torch, and headless.


def test_all_panels_but_one_tensor_work_without_torch() -> None:
    script = f"""
from pathlib import Path
from llamaconv import make_plan, open_checkpoint
from llamaconv.notebook import figures, preview
from llamaconv.notebook.panels import preview as panels
plan = make_plan(open_checkpoint(Path({str(sample())!r})))
one = panels.one_tensor(plan)
for panel in (panels.moves, panels.other_target, panels.glossary, panels.flavours):
    panel(plan).show(True)
figures.operations(plan), preview.problem_table(plan), preview.disk(plan, ".")
import sys
assert "torch" not in sys.modules
one.static()
assert "torch" in sys.modules, "the test can fail"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_the_notebook_runs_with_other_options_and_with_controls(tmp_path: Path) -> None:
    done = headless.run(
        NOTEBOOK.name, tmp_path, "dtype=float32", "generation=titan-0.2", "interactive=yes"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "-p generation titan-0.2 -p dtype float32" in text
    assert "bfloat16 to float32" in text and "layers.0.attention.wk.weight" in text


@pytest.mark.thorough
def test_a_source_with_problems_is_shown_to_the_end_and_fails_there(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf", num_key_value_heads=4, hidden_act="gelu")
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}")
    assert done.returncode != 0
    assert "hidden_act must be 'silu' in a Llama; got 'gelu'" in done.stderr
    assert "[16, 64]" in done.stderr and "[32, 64]" in done.stderr
    ran = (tmp_path / "run.ipynb").read_text()
    assert "llamaconv plan" in ran, "all but the last cell ran"
