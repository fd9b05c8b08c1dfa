"""Two checkpoints compared: whatever their formats, what differs and by how much."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints
from torch.distributed.checkpoint import save

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main
from llamaconv.verify.compare import compare_checkpoints

SMALL = replace(checkpoints.GQA, n_layers=2)
Q, W1, NORM = (
    f"model.layers.1.{name}.weight"
    for name in ("self_attn.q_proj", "mlp.gate_proj", "input_layernorm")
)


def converted(source: Path, target: Path, **options: object) -> Path:
    plan = make_plan(open_checkpoint(source), Target(**options))  # type: ignore[arg-type]
    return convert_checkpoint(plan, target, verified=False).target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write_model(tmp_path / "hf", SMALL)


def changed(source: Path, folder: Path, edit: checkpoints.Edit, **config: object) -> Path:
    weights = checkpoints.tensors(SMALL)
    edit(weights)
    entries = json.loads((source / "config.json").read_text())
    return checkpoints.write(folder, weights, entries, **config)


@pytest.mark.parametrize(
    "options",
    [
        {"generation": "titan-main", "shards": 3},
        {"generation": "titan-2024", "dtype": "float32"},
        {"to": "meta", "shards": 2},
    ],
)
def test_conversion_is_equal_to_its_source_in_every_format(
    source: Path, tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.verify.compare.WINDOW_BYTES", 2048)
    target = converted(source, tmp_path / "target", **options)
    for pair in ((source, target), (target, source)):
        compared = compare_checkpoints(*pair)
        assert compared.equal and len(compared.pairs) == 2 * 9 + 3
        assert any("reordered" in note for note in compared.notes)


def test_differences_are_listed_the_largest_first(source: Path, tmp_path: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[NORM] *= 2
        weights[W1][3, 5] += 8
        weights[Q] = weights[Q].roll(1, 0)

    other = converted(changed(source, tmp_path / "other", edit), tmp_path / "dcp")
    compared = compare_checkpoints(source, other)
    assert not compared.equal
    relative = {pair.names[0]: pair.relative for pair in compared.different}
    assert set(relative) == {NORM, W1, Q}
    assert list(relative.values()) == sorted(relative.values(), reverse=True)
    assert relative[NORM] == pytest.approx(1)
    (of_w1,) = [pair for pair in compared.pairs if pair.names[0] == W1]
    assert (of_w1.n_different, of_w1.largest) == (1, pytest.approx(8, abs=0.1))


def test_tensors_of_one_side_shapes_and_parameters_are_differences(
    source: Path, tmp_path: Path
) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights[NORM]
        weights["extra"] = torch.ones(2)
        weights["model.norm.weight"] = torch.ones(3)

    compared = compare_checkpoints(
        source, changed(source, tmp_path / "other", edit, rope_theta=5e5)
    )
    assert compared.only == ((NORM,), ("extra",))
    assert compared.description == {"rope_theta": (10000.0, 500000.0)}
    assert [pair.reason for pair in compared.different] == ["other shape"]
    shown = "\n".join(compared.lines())
    assert "<li>only in the second: extra</li>" in compared._repr_html_()
    assert "rope_theta: 10000.0 → 500000.0" in shown and f"only in the first: {NORM}" in shown


def test_nan_and_infinity_are_the_largest_difference_and_equal_to_themselves(
    source: Path, tmp_path: Path
) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[W1][0, :3] = torch.tensor([float("nan"), float("inf"), 1.0])

    broken = changed(source, tmp_path / "broken", edit)
    (worst,) = compare_checkpoints(source, broken).different
    assert worst.names[0] == W1 and worst.relative == float("inf")
    assert worst.to_json()["relative"] is None
    assert compare_checkpoints(broken, converted(broken, tmp_path / "dcp", dtype="float32")).equal


def test_tied_head_that_one_side_does_not_store_is_the_embedding(tmp_path: Path) -> None:
    tied = replace(SMALL, tied=True)
    weights = checkpoints.tensors(tied)
    del weights["lm_head.weight"]
    folder = checkpoints.write_model(tmp_path / "hf", tied)
    shutil.rmtree(folder)
    folder = checkpoints.write(folder, weights, checkpoints.CONFIG, num_hidden_layers=2,
                               tie_word_embeddings=True)  # fmt: skip
    compared = compare_checkpoints(folder, converted(folder, tmp_path / "dcp"))
    assert compared.equal
    assert any("tied" in note for note in compared.notes)


def test_sides_that_cannot_be_compared_are_refused(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    target = converted(source, tmp_path / "dcp")
    shutil.copytree(target, bare)
    (bare / "llamaconv.json").unlink()
    alone = tmp_path / "alone"
    shutil.copytree(source, alone)
    (alone / "config.json").unlink()
    with pytest.raises(RefusedError, match="number of heads"):
        compare_checkpoints(alone, bare)
    assert compare_checkpoints(source, bare).equal, "one side states the heads"
    fused = converted(source, tmp_path / "fused", generation="titan-main")
    (fused / "llamaconv.json").unlink()
    with pytest.raises(RefusedError, match="q, k and v as one tensor, and no file states"):
        compare_checkpoints(bare, fused)
    assert compare_checkpoints(fused, fused).equal, "nothing has to be taken apart"
    save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "foreign", no_dist=True)
    with pytest.raises(RefusedError, match="no tensor is in both"):
        compare_checkpoints(source, tmp_path / "foreign")


def test_exit_status_is_0_for_equal_1_for_different_2_for_damaged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = converted(source, tmp_path / "dcp")
    assert main(["compare", str(source), str(other)]) == 0
    assert "equal: all " in capsys.readouterr().out
    scaled = changed(source, tmp_path / "scaled", lambda weights: weights[W1].mul_(2))
    assert main(["compare", str(source), str(scaled), "--json"]) == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert not shown.err and not found["equal"]
    assert found["tensors"][0]["names"] == [W1, W1] and found["tensors"][0]["relative"] == 1
    assert main(["compare", str(source), str(tmp_path / "nowhere")]) == 2
    (source / "model-00002-of-00003.safetensors").unlink()
    assert main(["compare", str(source), str(source)]) == 2, "not all of it was compared"
