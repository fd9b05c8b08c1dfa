"""Any chain of conversions that ends where it began is equal to the bit, whatever the shapes.

A round trip alone cannot see a wrong direction, so every single step passes its checks as well,
the rotated scores among them.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_back import assert_same_folder

from llamaconv import Target, make_plan, open_checkpoint
from llamaconv.config import to_config
from llamaconv.convert import Conversion
from llamaconv.params import LlamaParams, RopeScaling

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
STOPS: dict[str, dict[str, Any]] = {
    "meta": {"to": "meta"},
    "0.2": {"to": "dcp", "generation": "titan-0.2", "shards": 3},
    "0.3": {"to": "dcp", "generation": "titan-0.3"},
    "kept rows": {"to": "dcp", "generation": "titan-2024", "rope": "half_split"},
}
CHAINS = [*itertools.permutations(STOPS, 2), ("0.2", "meta", "kept rows", "0.3")]


def source_of(folder: Path, params: LlamaParams) -> Path:
    weights = checkpoints.tensors(params, torch.float16 if params.tied else torch.bfloat16)
    if params.tied:
        del weights["lm_head.weight"]
    return checkpoints.write(folder, weights, to_config(params, None))


@pytest.mark.parametrize("shape", SHAPES)
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
    [("wide heads", "head"), ("tied, factor 32", "no factor for the RoPE scaling")],
)
def test_what_meta_cannot_express_is_said(tmp_path: Path, shape: str, words: str) -> None:
    source = source_of(tmp_path / "source", SHAPES[shape])
    plan = make_plan(open_checkpoint(source), Target(to="meta"))
    assert any(words in str(problem) for problem in plan.errors)


def test_biases_travel_between_hugging_face_and_meta_in_the_order_of_their_rows(
    tmp_path: Path, convert: Callable[..., Conversion]
) -> None:
    weights = checkpoints.tensors()
    for name in list(weights):
        if name.endswith("q_proj.weight"):
            size = weights[name].shape[0]
            weights[name.replace("weight", "bias")] = torch.arange(size).bfloat16()
    source = checkpoints.write(tmp_path / "source", weights)
    meta = convert(source, "meta", to="meta").target
    there = torch.load(meta / "consolidated.00.pth", weights_only=True)
    assert there["layers.3.attention.wq.bias"][:4].tolist() == [0.0, 4.0, 1.0, 5.0]
    assert_same_folder(source, convert(meta, "back", to="hf").target)
