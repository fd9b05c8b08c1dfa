"""Checkpoints that four ranks saved as DTensors, with a trainer's state beside the model."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.folders import assert_same_folder, fused, load_dcp, of_main

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.verify.compare import compare_checkpoints

pytestmark = pytest.mark.thorough

# Rows that four ranks cannot share evenly, in the vocabulary, in the feed-forward, and in a head.
UNEVEN = replace(
    checkpoints.GQA, vocab_size=81, ffn_dim=90, n_layers=11, n_heads=9, n_kv_heads=3, head_dim=6
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source folder, and beside it the same weights as four ranks saved them."""
    home = tmp_path_factory.mktemp("ranks")
    source = checkpoints.write_model(home / "source", UNEVEN)
    plan = make_plan(open_checkpoint(source))
    target = convert_checkpoint(plan, home / "whole", verified=False).target
    titan = load_dcp(target)
    namings = {
        "titan-0.3": titan,
        "fused": fused(titan, UNEVEN),
        "titan-main": of_main(titan, UNEVEN),
        "huggingface": checkpoints.tensors(UNEVEN),
    }
    torch.save(namings, home / "weights.pt")
    script = Path(__file__).parents[1] / "support" / "ranks_save.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--standalone", str(script), str(home / "weights.pt"), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.mark.parametrize(("kind", "most"), [("fsdp", 4), ("tp", 4), ("2d", 4)])
def test_rows_columns_and_both_come_back_equal_to_the_bit(
    saved: Path, tmp_path: Path, kind: str, most: int
) -> None:
    checkpoint = open_checkpoint(saved / kind)
    assert not checkpoint.problems
    assert checkpoint.generation == "titan-0.3"
    pieces = {len(tensor.pieces) for tensor in checkpoint.tensors.values()}
    assert max(pieces) == most
    assert any("optimizer" in ignored.name for ignored in checkpoint.ignored)
    plan = make_plan(checkpoint, Target(assets=str(saved / "source")))
    done = convert_checkpoint(plan, tmp_path / "back")
    assert done.verification is not None
    assert done.verification.ok
    assert_same_folder(saved / "source", done.target)


def test_resharded_dcp_loads_whole(
    saved: Path, tmp_path: Path, load_dcp: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    target = Target(to="dcp", generation="titan-0.2", shards=5, assets=str(saved / "source"))
    plan = make_plan(open_checkpoint(saved / "2d"), target)
    done: Conversion = convert_checkpoint(plan, tmp_path / "resharded")
    found = load_dcp(done.target)
    expected = torch.load(saved / "weights.pt", weights_only=True)["titan-0.3"]
    for move in plan.written:
        assert torch.equal(found[move.target_name], expected[move.source])


@pytest.mark.parametrize("kind", ["fused-fsdp", "fused-2d", "hf-names"])
def test_fused_qkv_and_names_of_transformers_come_back_too(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    checkpoint = open_checkpoint(saved / kind)
    assert not checkpoint.problems
    plan = make_plan(checkpoint, Target(assets=str(saved / "source")))
    assert plan.source.rope == ("half_split" if kind == "hf-names" else "interleaved")
    done = convert_checkpoint(plan, tmp_path / "back")
    assert done.verification is not None and done.verification.ok
    assert_same_folder(saved / "source", done.target)


@pytest.mark.parametrize("kind", ["fsdp", "first", "tp", "2d", "3d"])
def test_boxes_of_titan_main_convert_equal_to_the_bit(
    saved: Path,
    tmp_path: Path,
    load_dcp: Callable[[Path], dict[str, torch.Tensor]],
    kind: str,
) -> None:
    checkpoint = open_checkpoint(saved / f"main-{kind}")
    assert not checkpoint.problems
    assert checkpoint.generation == "titan-main"
    assets = str(saved / "source")
    done = convert_checkpoint(make_plan(checkpoint, Target(assets=assets)), tmp_path / "back")
    assert done.verification is not None and done.verification.ok
    assert_same_folder(saved / "source", done.target)
    expected = torch.load(saved / "weights.pt", weights_only=True)
    for generation in ("titan-0.3", "titan-main"):
        target = Target(to="dcp", generation=generation, shards=5, assets=assets)
        found = load_dcp(convert_checkpoint(make_plan(checkpoint, target), tmp_path / "x").target)
        shutil.rmtree(tmp_path / "x")
        assert found.keys() == expected[generation].keys()
        assert all(torch.equal(found[name], expected[generation][name]) for name in found)
    compared = compare_checkpoints(saved / f"main-{kind}", saved / "source")
    assert compared.equal and len(compared.pairs) == len(expected["titan-0.3"])


@pytest.mark.parametrize("kind", ["hf-fsdp", "hf-tp", "hf-2d", "hf-consolidated"])
def test_what_torch_writes_for_hugging_face_is_a_source(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    checkpoint = open_checkpoint(saved / kind)
    assert not checkpoint.errors
    assert "config.json: not found" in str(make_plan(checkpoint).errors[0])
    plan = make_plan(checkpoint, Target(assets=str(saved / "source")))
    done = convert_checkpoint(plan, tmp_path / "dcp")
    assert done.verification is not None and done.verification.ok
    back = convert_checkpoint(make_plan(open_checkpoint(done.target)), tmp_path / "back").target
    assert_same_folder(saved / "source", back)


def test_missing_rank_of_hugging_face_shards_is_an_error(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "hf-fsdp", tmp_path / "cut")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    problems = " ".join(map(str, open_checkpoint(folder).errors))
    assert "model.embed_tokens.weight is cut over 3 files" in problems
    assert "rank's file is missing" in problems
