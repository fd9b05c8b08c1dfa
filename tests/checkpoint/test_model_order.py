"""What `inspect` lists: the layers folded, in the order of a forward pass, and the model's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inputs import SHAPES
from support import checkpoints

from llamaconv.checkpoint.model_order import folded_rows
from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.cli import main

Q = "model.layers.{}.self_attn.q_proj.weight"


def folded(*named: tuple[str, str, tuple[int, ...]]) -> list[tuple[str, str]]:
    tensors = [TensorInfo(name, dtype, shape) for name, dtype, shape in named]
    return [(row[0], row[1]) for row in folded_rows(tensors, "huggingface")]


def test_inspect_of_405b_has_one_row_per_role_and_says_which_llama_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.write_holes(tmp_path / "big", SHAPES["405B"], 20)
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("model.embed_tokens.weight ")
    assert any(line.startswith("model.layers.{0..125}.self_attn.q_proj.weight  ") for line in lines)
    assert len(lines) < 20
    assert lines[13].startswith("model.norm.weight ") and lines[14].startswith("lm_head.weight ")
    assert lines[-2] == "Llama 3.1 405B"
    assert main(["inspect", str(folder), "--all"]) == 0
    shown = capsys.readouterr().out
    assert Q.format(125) in shown and "more rows" not in shown


def test_json_of_inspect_still_has_every_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    assert main(["inspect", str(folder), "--json"]) == 0
    names = [one["name"] for one in json.loads(capsys.readouterr().out)["tensors"]]
    assert names == list(open_checkpoint(folder).tensors)


def test_gap_in_the_layers_and_a_layer_of_another_dtype_are_seen() -> None:
    layers = [
        (Q.format(n), "float32" if n == 5 else "bfloat16", (8, 8)) for n in (0, 1, 2, 5, 10, 11)
    ]
    norm = ("model.layers.0.input_layernorm.weight", "bfloat16", (8,))
    assert folded(*layers, norm) == [
        ("model.layers.0.input_layernorm.weight", "1"),
        (Q.format("{0..2,10..11}"), "5"),
        (Q.format("5"), "1"),
    ]


def test_unknown_names_are_folded_too_and_come_last() -> None:
    odd = [(f"model.layers.{n}.mlp.down_proj.qweight", "int32", (4,)) for n in range(3)]
    rows = folded(*odd, ("x.01.y", "int8", (1,)), ("lm_head.weight", "float32", (8, 8)))
    assert rows == [
        ("lm_head.weight", "1"),
        ("model.layers.{0..2}.mlp.down_proj.qweight", "3"),
        ("x.01.y", "1"),
    ]


def test_checkpoint_with_errors_is_listed_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints.tensors(replace(checkpoints.GQA, n_layers=2))
    weights[Q.format(1)] = torch.ones(3, 3)
    folder = checkpoints.write(tmp_path / "hf", weights, num_hidden_layers=2)
    assert main(["inspect", str(folder)]) == 2
    shown = capsys.readouterr()
    assert "not a published Llama" in shown.out
    assert Q.format(0) in shown.out and Q.format(1) in shown.out
    assert "error: " in shown.err
