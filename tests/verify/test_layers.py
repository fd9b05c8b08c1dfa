"""Two checkpoints run side by side: which layer is the first to diverge."""

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
from llamaconv.model import forward
from llamaconv.model.names import every_role
from llamaconv.sample import held_out_text
from llamaconv.verify.layers import run_layers
from llamaconv.verify.layers_run import LayersRun
from llamaconv.verify.sides import open_sides

SMALL = replace(checkpoints.GQA, n_layers=3)


def weights() -> dict[str, torch.Tensor]:
    """Weights so small that activations keep their size through the layers."""
    return {
        name: one if one.ndim == 1 else one * 0.4
        for name, one in checkpoints.tensors(SMALL, torch.float32).items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = checkpoints.write_model(tmp_path / "base", SMALL)
    entries = json.loads((folder / "config.json").read_text())
    return checkpoints.write(tmp_path / "hf", weights(), entries)


def changed(source: Path, folder: Path, edit: checkpoints.Edit, **config: object) -> Path:
    edit(edited := weights())
    return checkpoints.write(
        folder, edited, json.loads((source / "config.json").read_text()), **config
    )


def ran(one: Path, other: Path) -> LayersRun:
    return run_layers(open_sides(one, other)[0])


def test_conversion_computes_the_same_in_every_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.verify.layers._WINDOW_BYTES", 4096)
    target = convert_checkpoint(
        make_plan(open_checkpoint(source), Target(shards=2)), tmp_path / "dcp", verified=False
    ).target
    steps: list[tuple[str, int, int]] = []
    said: list[str] = []
    found = run_layers(open_sides(source, target)[0], lambda *step: steps.append(step), said.append)
    assert [one.name for one in found.stages] == [
        "embedding", "layer 0", "layer 1", "layer 2", "logits"
    ]  # fmt: skip
    assert not found.diverges and not found.first and found.agreement == 1
    assert steps[-1] == ("read", steps[-1][2], steps[-1][2])
    assert len(said) == 1 and "3 layers of both sides on 16 tokens: about" in said[0]


def test_streamed_run_is_the_reference_forward_pass(source: Path) -> None:
    named = weights()
    stored = open_sides(source, source)[0][0].tensors
    tensors = {place: named[tensor.name] for place, tensor in stored.items()}
    tokens = torch.tensor([[byte % SMALL.vocab_size for byte in held_out_text()[:16]]])
    expected = forward.forward(tensors, SMALL, tokens, "half_split")
    loss = forward.loss(expected, tokens).item()
    assert ran(source, source).losses == (pytest.approx(loss, rel=1e-4),) * 2


@pytest.mark.parametrize("layer", [0, 2])
def test_first_layer_that_diverges_is_named_and_those_after_it_are_not(
    source: Path, tmp_path: Path, layer: int
) -> None:
    name = f"model.layers.{layer}.self_attn.q_proj.weight"

    def edit(edited: dict[str, torch.Tensor]) -> None:
        edited[name] = edited[name].flip(0)

    found = ran(source, changed(source, tmp_path / "other", edit))
    assert found.first == f"layer {layer}"
    alone = [one.name for one in found.stages if one.alone > 1e-3]
    assert alone == [f"layer {layer}"], "the others do the same with the same input"
    assert found.stages[-1].so_far > 1e-3, "its difference reaches the logits"


def test_other_rope_base_diverges_although_all_values_are_equal(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(source, tmp_path / "other", lambda _: None, rope_theta=500.0)
    assert ran(source, other).first == "layer 0"
    assert main(["compare", str(source), str(other), "--run", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["run"]["first"] == "layer 0"
    assert main(["compare", str(source), str(source), "--run"]) == 0
    shown = capsys.readouterr()
    assert "no layer diverges" in shown.out and "about" in shown.err


def test_steps_of_a_run_without_parameters_need_the_assets(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "step-10", tmp_path / "step-20"
    for folder, scale in ((first, 1.0), (second, 1.5)):
        roles = ((role.in_naming("titan-0.3", n), role, n) for role, n in every_role(SMALL))
        state = {
            str(name): weights()[str(role.in_naming("huggingface", n))] for name, role, n in roles
        }
        state["layers.1.feed_forward.w2.weight"] *= scale
        save({**state, "train_state.step": torch.tensor(10)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(RefusedError, match="--assets"):
        ran(first, second)
    with pytest.raises(RefusedError, match="--assets needs a folder"):
        open_sides(first, second, str(tmp_path / "nowhere"))
    sides, _ = open_sides(first, second, str(source))
    assert run_layers(sides).first == "layer 1"
    shutil.copy(source / "config.json", first)
    assert ran(first, second).first == "layer 1", "config.json beside a step will do"
    assert main(["compare", str(first), str(second), "--assets", str(source)]) == 1


def test_nan_diverges(source: Path, tmp_path: Path) -> None:
    def edit(edited: dict[str, torch.Tensor]) -> None:
        edited["model.layers.1.mlp.up_proj.weight"][:] = float("nan")

    found = ran(source, changed(source, tmp_path / "other", edit))
    assert found.first == "layer 1" and found.to_json()["stages"][-1]["so_far"] is None
    assert "not finite" in str(found.table())


def test_sides_that_cannot_be_run_are_refused_with_the_reason(source: Path, tmp_path: Path) -> None:
    def edit(edited: dict[str, torch.Tensor]) -> None:
        del edited["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(RefusedError, match="layer 1: w3 is missing"):
        ran(source, changed(source, tmp_path / "less", edit))
    deeper = checkpoints.write_model(tmp_path / "deeper", replace(SMALL, n_layers=2))
    with pytest.raises(RefusedError, match="n_layers 3 and 2"):
        ran(source, deeper)


def test_tied_head_that_neither_side_stores_is_the_embedding(source: Path, tmp_path: Path) -> None:
    def edit(edited: dict[str, torch.Tensor]) -> None:
        del edited["lm_head.weight"]

    tied = changed(source, tmp_path / "tied", edit, tie_word_embeddings=True)
    assert not ran(tied, tied).diverges


def test_verify_runs_the_layers_on_request_and_a_cast_may_differ(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, cast = tmp_path / "dcp", tmp_path / "cast"
    plan = make_plan(open_checkpoint(source), Target())
    convert_checkpoint(plan, target, verified=False)
    assert main(["verify", str(source), str(target), "--run"]) == 0
    assert "no layer diverges" in capsys.readouterr().out
    assert main(["verify", str(target), "--run"]) == 2
    convert_checkpoint(
        make_plan(open_checkpoint(source), Target(dtype="bfloat16")), cast, verified=False
    )
    assert main(["verify", str(source), str(cast), "--run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] and shown["run"]["first"], "rounded, and shown"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert main(["verify", str(source), str(target), "--run"]) == 1
    assert "check layers failed: the first part that diverges" in capsys.readouterr().err
