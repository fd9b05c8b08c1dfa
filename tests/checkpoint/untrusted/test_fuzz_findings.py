"""What ``test_fuzz`` and ``fuzz/readers.py`` found, one ordinary test each, made by code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import archives, checkpoints
from torch.distributed.checkpoint import save

from llamaconv import FailedError, RefusedError, Target, make_plan, open_checkpoint
from llamaconv.checkpoint import receipt
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.untrusted.files import LocalBytes
from llamaconv.checkpoint.untrusted.safetensors_header import parse_header
from llamaconv.checkpoint.untrusted.torch_archive import Archive
from llamaconv.convert.convert import Conversion
from llamaconv.verify.independent_readers import DcpReader, load_dcp


@pytest.mark.parametrize("dtype", [[2, 2], {}, None, 7])
def test_dtype_that_is_not_text_is_a_problem(tmp_path: Path, dtype: object) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(4)
    _, (problem,) = parse_header(tmp_path / "x.safetensors", whole, len(whole))
    assert "unknown dtype" in problem.message


def test_folder_named_config_json_is_an_error(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hf")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(RefusedError, match=r"config\.json"):
        make_plan(open_checkpoint(folder), Target()).raise_for_errors()


def test_failed_check_names_why_torchs_loader_failed(tmp_path: Path) -> None:
    """Its exception says only that some rank failed, and is no ``Exception`` at that."""
    save({"norm.weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(FailedError, match=r"torch's own loader fails on it \(.*other\.weight"):
        load_dcp(DcpReader(tmp_path), [TensorInfo("other.weight", "float32", (3,))])


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x02G\x00.", "cannot be read: it ends early"),
        (b"\x80\x02N.", "expected a tensor, found NoneType"),
    ],
)
def test_dcp_entry_with_a_cut_pickle_or_without_a_tensor_is_refused(
    tmp_path: Path, pickled: bytes, said: str
) -> None:
    archives.write_dcp(tmp_path, lambda entries: entries.update({"data.pkl": pickled}))
    assert said in open_checkpoint(tmp_path).errors[0].message


def test_receipt_without_a_digest_can_be_shown(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    entries = convert(source, verified=False).receipt.to_json()
    entries["tensors"][0]["digests"] = []
    assert "first digest" in str(receipt.from_json("x", entries))
    entries["tensors"] = []
    assert "0 written" in str(receipt.from_json("x", entries))


def test_archive_directory_with_an_undecodable_name_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    content[content.index(b"PK\x01\x02") + 46] = 0xBC
    (tmp_path / "file").write_bytes(content)
    with (
        open(tmp_path / "file", "rb") as file,
        pytest.raises(ValueError, match="'utf-8' codec can't decode"),
    ):
        Archive(LocalBytes(file), 0, len(content))


@pytest.mark.parametrize("shape", [(8,), (1, 8, 8), ()])
def test_meta_embedding_that_is_not_a_matrix_is_an_error(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    for number in range(2):
        state = {"norm.weight": torch.ones(8), "tok_embeddings.weight": torch.ones(shape)}
        torch.save(state, tmp_path / f"consolidated.0{number}.pth")
    (tmp_path / "params.json").write_text("{}")
    message = open_checkpoint(tmp_path).errors[0].message
    assert f"tok_embeddings.weight has the shape {list(shape)} instead of 2 axes" in message


def test_archive_record_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    content[content.index(b"PK\x01\x02") + 38] = 0x10
    (tmp_path / "file").write_bytes(content)
    with (
        open(tmp_path / "file", "rb") as file,
        pytest.raises(ValueError, match="its directory is damaged"),
    ):
        Archive(LocalBytes(file), 0, len(content))
