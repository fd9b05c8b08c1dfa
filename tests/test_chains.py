"""Any chain of conversions that ends where it began is equal to the bit, whatever the shapes.

A round trip alone cannot see a wrong direction, so every single step passes its checks as well,
the rotated scores among them.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.folders import assert_same_folder
from transformers import AutoModelForCausalLM

from llamaconv import Target, make_plan, open_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.model.config_json import to_config
from llamaconv.model.params import LlamaParams, RopeScaling

SHAPES = {
    "grouped": replace(checkpoints.GQA, n_layers=2),
    "a head each, odd vocabulary": replace(
        checkpoints.GQA, n_heads=6, n_kv_heads=6, dim=144, head_dim=24, vocab_size=131, n_layers=2
    ),
    "one kv head": replace(
        checkpoints.GQA, n_heads=5, n_kv_heads=1, dim=60, head_dim=12, ffn_dim=77, n_layers=3
    ),
    "scaled": replace(
        checkpoints.GQA,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        n_layers=2,
    ),
    "tied, factor 32": replace(
        checkpoints.GQA, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64), tied=True, n_layers=2
    ),
    "wide heads": replace(checkpoints.GQA, n_heads=8, n_kv_heads=4, head_dim=16, n_layers=2),
}
# The others are thorough: 5 to 8 seconds each.
BY_DEFAULT = ("grouped", "tied, factor 32")
STOPS: dict[str, dict[str, Any]] = {
    "meta": {"to": "meta"},
    "main": {"to": "dcp", "generation": "titan-main", "shards": 3},
    "0.3": {"to": "dcp", "generation": "titan-0.3"},
    "kept rows": {"to": "dcp", "generation": "titan-2024", "rope": "half_split"},
}
CHAINS = [*itertools.permutations(STOPS, 2), ("main", "meta", "kept rows", "0.3")]


def source_of(folder: Path, params: LlamaParams) -> Path:
    weights = checkpoints.tensors(params, torch.float16 if params.tied else torch.bfloat16)
    if params.tied:
        del weights["lm_head.weight"]
    return checkpoints.write(folder, weights, to_config(params, None))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=() if shape in BY_DEFAULT else pytest.mark.thorough)
        for shape in SHAPES
    ],
)
def test_every_chain_ends_with_the_bits_that_it_began_with(
    tmp_path: Path, convert: Callable[..., Conversion], shape: str
) -> None:
    params = SHAPES[shape]
    source = source_of(tmp_path / "source", params)
    fits_meta = shape not in ("wide heads", "tied, factor 32")
    expressible = [chain for chain in CHAINS if "meta" not in chain or fits_meta]
    assert len(expressible) >= 6
    reached: dict[tuple[str, ...], Path] = {(): source}
    for chain in expressible:
        for length, stop in enumerate(chain, 1):
            if chain[:length] not in reached:
                done = convert(
                    reached[chain[: length - 1]], " ".join(chain[:length]), **STOPS[stop]
                )
                assert done.verification is not None and done.verification.ok
                reached[chain[:length]] = done.target
        back = convert(reached[chain], "back " + " ".join(chain), to="hf", verified=False)
        assert_same_folder(source, back.target)


@pytest.mark.parametrize(
    ("shape", "words"),
    [("wide heads", "head"), ("tied, factor 32", "cannot state the RoPE scaling")],
)
def test_values_that_meta_cannot_express_are_reported(
    tmp_path: Path, shape: str, words: str
) -> None:
    source = source_of(tmp_path / "source", SHAPES[shape])
    plan = make_plan(open_checkpoint(source), Target(to="meta"))
    assert any(words in str(problem) for problem in plan.errors)


def test_biases_travel_between_hugging_face_and_meta_in_the_order_of_their_rows(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    weights = checkpoints.tensors()
    for name in list(weights):
        if "self_attn" in name:
            size = weights[name].shape[0]
            weights[name.replace("weight", "bias")] = torch.arange(size).bfloat16()
    source = checkpoints.write(tmp_path / "source", weights, attention_bias=True)
    done = convert(source, "meta", to="meta")
    assert ["48 biases are not zero" in p.message for p in done.plan.problems] == [True]
    meta = done.target
    there = torch.load(meta / "consolidated.00.pth", weights_only=True)
    assert there["layers.3.attention.wq.bias"][:4].tolist() == [0.0, 4.0, 1.0, 5.0]
    back = convert(meta, "back", to="hf").target
    assert_same_folder(source, back)
    # transformers reads biases only where the configuration says so.
    _, found = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not found["unexpected_keys"]
    assert not found["missing_keys"]
