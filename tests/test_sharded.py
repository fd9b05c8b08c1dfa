"""Checkpoints that four ranks saved as DTensors, with a trainer's state beside the model."""

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source folder, and beside it the same weights as four ranks saved them."""
    home = tmp_path_factory.mktemp("ranks")
    source = checkpoints.write(
        home / "source",
        checkpoints.tensors(UNEVEN),
        vocab_size=81,
        intermediate_size=90,
        num_hidden_layers=11,
    )
    plan = make_plan(open_checkpoint(source))
    target = convert_checkpoint(plan, home / "whole", verified=False).target
    from conftest import load_dcp

    torch.save(load_dcp(target), home / "weights.pt")
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
    expected = torch.load(saved / "weights.pt", weights_only=True)
    for move in plan.written:
        assert torch.equal(found[move.writes], expected[move.source])
