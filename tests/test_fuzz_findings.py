"""What ``test_fuzz`` and ``fuzz/readers.py`` found, one ordinary test each, made by code."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from torch.distributed.checkpoint import save

from llamaconv import FailedError, RefusedError, Target, make_plan, open_checkpoint
from llamaconv.formats.safetensors_header import parse_header
from llamaconv.oracles import load_dcp
from llamaconv.pieces import TensorInfo


@pytest.mark.parametrize("dtype", [[2, 2], {}, None, 7])
def test_a_dtype_that_is_no_text(tmp_path: Path, dtype: object) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(4)
    _, (problem,) = parse_header(tmp_path / "x.safetensors", whole, len(whole))
    assert "is not known" in problem.message


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(RefusedError, match=r"config\.json"):
        make_plan(open_checkpoint(folder), Target()).check()


def test_the_cause_is_said_where_torchs_own_loader_fails(tmp_path: Path) -> None:
    """Its exception says only that some rank failed, and is no ``Exception`` at that."""
    save({"norm.weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(FailedError, match=r"torch's own loader fails on it \(.*other\.weight"):
        load_dcp(tmp_path, [TensorInfo("other.weight", "float32", (3,))])
