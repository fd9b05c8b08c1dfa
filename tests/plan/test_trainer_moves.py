"""What a plan refuses to do with a run's optimizer: one clear error per cause, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, runs

from llamaconv import Target, make_plan, open_checkpoint
from llamaconv.report.errors import Problem

WQ, WO = "layers.0.attention.wq.weight", "layers.0.attention.wo.weight"
W1, W3 = "layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w3.weight"
State = dict[str, Any]


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., tuple[Problem, ...]]:
    """The problems of the plan for a run of 0.2, after an edit of its state."""
    assets = checkpoints.write(
        tmp_path / "assets", checkpoints.tensors(runs.PARAMS), num_hidden_layers=2
    )

    number = count()

    def plan(edit: Callable[[State], Any], **options: Any) -> tuple[Problem, ...]:
        state = runs.state("titan-0.2")
        edit(state)
        source = open_checkpoint(runs.write(tmp_path / f"run-{next(number)}", state))
        options = {"with_optimizer": True, "assets": str(assets), **options}
        return make_plan(source, Target(**options)).problems

    return plan


def _optimizer(state: State, names: str) -> list[str]:
    return [name for name in state["optimizer"] if names in name]


def _drop(names: str) -> Callable[[State], Any]:
    return lambda state: [state["optimizer"].pop(name) for name in _optimizer(state, names)]


def _set(name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: state["optimizer"].update({name: value})


def _nothing(_state: State) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state.pop("optimizer"), "holds no state of an optimizer"),
        (_drop(f"state.{WO}.exp_avg_sq"), f"1 of 21 parameters of the optimizer have no exp_avg_sq: "
         f"optimizer.state.{WO}.exp_avg_sq"),
        (_drop("exp_avg_sq"), "21 of 21 parameters of the optimizer have no exp_avg_sq"),
        (_drop(f"param_groups.{WO}.lr"), f"have no lr: optimizer.param_groups.{WO}.lr"),
        (_drop(WO), f"no state of 1 tensors of the model: {WO}"),
        (_set(f"state.{WO}.exp_avg", torch.zeros(64, 32)),
         f"{WO}.exp_avg: expected [64, 64], found [64, 32]"),
        (_set("state.layers.7.attention.wo.weight.exp_avg", torch.zeros(64, 64)),
         "1 entries of the optimizer belong to no tensor of the model: optimizer.state.layers.7"),
        (_set("state.layers.0.attention.wqkv.weight.exp_avg", torch.zeros(96, 64)),
         "its optimizer has wq twice"),
    ],
)  # fmt: skip
def test_state_that_does_not_match_its_weights_is_one_error(
    problems: Callable[..., tuple[Problem, ...]], edit: Callable[[State], Any], words: str
) -> None:
    (error,) = (one for one in problems(edit) if one.level == "error")
    assert words in error.message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"param_groups.{W3}.weight_decay", 0.0, "tells w1 and w3 apart by weight_decay"),
        (f"state.{W3}.step", torch.tensor(1.0), "tells w1 and w3 apart by step"),
        (f"param_groups.{WQ}.lr", 1.0, "tells wq and wk and wv apart by lr"),
        (f"state.{W3}.exp_avg", torch.zeros(96, 64).double(), "by dtypes of exp_avg (float32, float64)"),
    ],
)  # fmt: skip
def test_roles_that_one_parameter_cannot_tell_apart_are_refused_by_name(
    problems: Callable[..., tuple[Problem, ...]], name: str, value: Any, words: str
) -> None:
    found = problems(_set(name, value), generation="titan-main")
    (error,) = (one for one in found if one.level == "error")
    assert words in error.message
    assert "Choose a generation that keeps them apart" in error.message


def test_what_other_generations_can_tell_apart_they_do(
    problems: Callable[..., tuple[Problem, ...]],
) -> None:
    (only,) = problems(_set(f"param_groups.{W3}.lr", 1.0), generation="titan-0.3")
    assert only.level == "warning" and "the data begins anew" in only.message
    assert "--checkpoint.exclude_from_loading dataloader" in only.message
    assert not problems(_set(f"param_groups.{WQ}.lr", 1.0), generation="titan-0.2", shards=2)


def test_0_2_has_one_group_for_all_parameters(tmp_path: Path) -> None:
    weights = checkpoints.tensors(runs.PARAMS)
    assets = checkpoints.write(tmp_path / "assets", weights, num_hidden_layers=2)
    state = runs.state("titan-0.3")
    state["optimizer"][f"param_groups.{WO}.weight_decay"] = 0.0
    source = open_checkpoint(runs.write(tmp_path / "run", state))
    options = {"with_optimizer": True, "assets": str(assets)}
    (error,) = make_plan(source, Target(generation="titan-0.2", **options)).errors
    assert "its parameter groups differ in weight_decay" in error.message and WO in error.message
    assert not make_plan(source, Target(generation="titan-main", **options)).errors
    # Of a scheduler's state a number is read, and nothing else.
    state["optimizer"][f"param_groups.{WO}.weight_decay"] = 0.01
    state["lr_scheduler"]["last_epoch"] = "two"
    source = open_checkpoint(runs.write(tmp_path / "other", state))
    (error,) = make_plan(source, Target(generation="titan-0.2", **options)).errors
    assert "lr_scheduler.last_epoch: expected a number" in error.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "hf"}, "Hugging Face has no place for an optimizer. Choose --to dcp"),
        ({"to": "meta"}, "Meta has no place for an optimizer"),
        ({"generation": "titan-2024"}, "no release loads an optimizer from it"),
        ({"tie": "head"}, "--tie head makes one parameter of two that were trained apart"),
    ],
)
def test_targets_without_a_place_for_it_are_refused(
    problems: Callable[..., tuple[Problem, ...]], options: dict[str, Any], words: str
) -> None:
    (error,) = (one for one in problems(_nothing, **options) if one.level == "error")
    assert words in error.message


def test_a_source_without_a_trainer_is_refused(source: Path) -> None:
    (error,) = make_plan(open_checkpoint(source), Target(with_optimizer=True)).errors
    assert "is no DCP, and the state of a trainer" in error.message


def test_what_is_left_out_or_not_there_is_a_warning(
    problems: Callable[..., tuple[Problem, ...]],
) -> None:
    def edit(state: State) -> None:
        del state["dataloader"]
        state["ema"] = {"shadow": torch.zeros(3)}

    first, second = problems(edit)
    assert {first.level, second.level} == {"warning"}
    assert "left out are 1 under ema" in first.message
    assert "dataloader: the source has none" in second.message


def test_the_same_names_and_chunks_are_nothing_to_convert(
    problems: Callable[..., tuple[Problem, ...]],
) -> None:
    (error,) = problems(_nothing, generation="titan-0.2")
    assert "nothing to convert" in error.message
    assert not problems(_nothing, generation="titan-0.2", shards=2)


@pytest.mark.parametrize("of", ["the model", "the optimizer"])
def test_biases_are_not_left_behind(tmp_path: Path, of: str) -> None:
    weights = checkpoints.tensors(runs.PARAMS)
    assets = checkpoints.write(tmp_path / "assets", weights, num_hidden_layers=2)
    state = runs.state("titan-0.3 split")
    name = "layers.0.attention.qkv_linear.wq.bias"
    if of == "the model":
        state[name] = torch.zeros(64)
    else:
        state["optimizer"][f"state.{name}.exp_avg"] = torch.zeros(64)
    source = open_checkpoint(runs.write(tmp_path / "run", state))
    options = {"with_optimizer": True, "assets": str(assets)}
    (error,) = make_plan(source, Target(generation="titan-main", **options)).errors
    assert "biases" in error.message and name in error.message
