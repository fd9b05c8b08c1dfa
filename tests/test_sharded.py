"""Checkpoints that four ranks saved as DTensors, with a trainer's state beside the model."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from test_back import assert_same_folder

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert import Conversion

# Rows that four ranks cannot share evenly, in the vocabulary and in the feed-forward.
UNEVEN = replace(checkpoints.GQA, vocab_size=81, ffn_dim=90, n_layers=11)


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """wq, wk and wv as TorchTitan's FusedQKVLinear merges them (models/common/attention.py)."""
    made = dict(weights)
    heads, kv = UNEVEN.n_heads, UNEVEN.n_kv_heads
    for layer in range(UNEVEN.n_layers):
        start = f"layers.{layer}.attention.qkv_linear."
        q, k, v = (made.pop(f"{start}{name}.weight") for name in ("wq", "wk", "wv"))
        groups = [q.view(kv, heads // kv, 8, -1), k.view(kv, 1, 8, -1), v.view(kv, 1, 8, -1)]
        made[f"{start}wqkv.weight"] = torch.cat(groups, dim=1).reshape(-1, UNEVEN.dim)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source folder, and beside it the same weights as four ranks saved them."""
    home = tmp_path_factory.mktemp("ranks")
    source = checkpoints.write_model(home / "source", UNEVEN)
    plan = make_plan(open_checkpoint(source))
    target = convert_checkpoint(plan, home / "whole", verified=False).target
    from conftest import load_dcp

    titan = load_dcp(target)
    namings = {
        "titan-0.3": titan,
        "fused": fused(titan),
        "huggingface": checkpoints.tensors(UNEVEN),
    }
    torch.save(namings, home / "weights.pt")
    script = Path(__file__).with_name("ranks_save.py")
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


def test_a_resharded_one_loads_whole(
    saved: Path, tmp_path: Path, load_dcp: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    target = Target(to="dcp", generation="titan-0.2", shards=5, assets=str(saved / "source"))
    plan = make_plan(open_checkpoint(saved / "2d"), target)
    done: Conversion = convert_checkpoint(plan, tmp_path / "resharded")
    found = load_dcp(done.target)
    expected = torch.load(saved / "weights.pt", weights_only=True)["titan-0.3"]
    for move in plan.written:
        assert torch.equal(found[move.writes], expected[move.source])


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


def test_fused_qkv_of_other_heads_is_refused_by_shape(saved: Path, tmp_path: Path) -> None:
    other = checkpoints.write_model(tmp_path / "other", UNEVEN, num_key_value_heads=4)
    plan = make_plan(open_checkpoint(saved / "fused-fsdp"), Target(assets=str(other)))
    assert "wqkv.weight: shape [96, 64], [128, 64] expected of 8 heads and 4 kv heads" in str(
        plan.errors[0]
    )


@pytest.mark.parametrize("kind", ["hf-fsdp", "hf-tp", "hf-2d", "hf-consolidated"])
def test_what_torch_writes_for_hugging_face_is_a_source(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    checkpoint = open_checkpoint(saved / kind)
    assert not checkpoint.errors
    assert "config.json: is not there" in str(make_plan(checkpoint).errors[0])
    plan = make_plan(checkpoint, Target(assets=str(saved / "source")))
    done = convert_checkpoint(plan, tmp_path / "dcp")
    assert done.verification is not None and done.verification.ok
    back = convert_checkpoint(make_plan(open_checkpoint(done.target)), tmp_path / "back").target
    assert_same_folder(saved / "source", back)


def test_a_rank_of_hugging_face_shards_that_is_missing_is_said(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "hf-fsdp", tmp_path / "cut")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    problems = " ".join(map(str, open_checkpoint(folder).errors))
    assert "model.embed_tokens.weight is cut over 3 files" in problems
    assert "a rank's file is missing" in problems
