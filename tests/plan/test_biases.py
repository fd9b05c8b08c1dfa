"""Biases: where they go, where they cannot, and what config.json says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.checkpoints import GQA

from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import Target

ATTENTION = {"q_proj": 64, "k_proj": 16, "v_proj": 16, "o_proj": 64}


def plan_of(
    tmp_path: Path, value: float, to: str, but: tuple[str, ...] = (), **changes: bool
) -> Plan:
    weights = checkpoints.tensors()
    for layer in range(GQA.n_layers):
        for name, size in ATTENTION.items():
            if name not in but:
                bias = torch.full((size,), value).bfloat16()
                weights[f"model.layers.{layer}.self_attn.{name}.bias"] = bias
    folder = checkpoints.write(tmp_path / "source", weights, **changes)
    return make_plan(open_checkpoint(folder), Target(to=to))


def test_zero_biases_are_dropped_for_meta(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 0.0, "meta", attention_bias=True)
    assert not plan.errors
    assert plan.counts["dropped"] == 48
    assert not any(move.target_name.endswith("bias") for move in plan.written)


def test_other_biases_are_written_for_meta_with_one_warning(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1.0, "meta", attention_bias=True)
    (problem,) = plan.problems
    assert problem.level == "warning"
    assert "48 biases" in problem.message
    assert "12 of k_proj" in problem.message
    assert sum(move.target_name.endswith("bias") for move in plan.written) == 48


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_biases_that_config_json_does_not_switch_on_are_a_warning(tmp_path: Path, to: str) -> None:
    plan = plan_of(tmp_path, 1.0, to)
    assert any("attention_bias is not true" in problem.message for problem in plan.problems)


def test_flag_without_biases_is_a_warning(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "source", mlp_bias=True)
    plan = make_plan(open_checkpoint(folder), Target())
    assert ["mlp_bias is true" in problem.message for problem in plan.problems] == [True]


def test_biases_of_some_matrices_only_are_a_warning_with_the_others_names(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1.0, "hf", but=("o_proj",), attention_bias=True)
    (problem,) = plan.problems
    assert "48 biases" in problem.message
    assert "36" in problem.message
    assert "o_proj" in problem.message


def test_flags_of_a_written_config_follow_the_tensors(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    folder = checkpoints.write(tmp_path / "source", mlp_bias=True, attention_bias=True)
    target = convert(folder, "target", to="hf").target
    config = json.loads((target / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (False, False)
