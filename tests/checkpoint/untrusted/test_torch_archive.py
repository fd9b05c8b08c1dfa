"""Archives whose directory tells another story than their pickle: refused, in both formats."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.archives import Bend, saved, write_dcp, write_meta

from llamaconv import open_checkpoint
from llamaconv.checkpoint.untrusted.files import LocalBytes
from llamaconv.checkpoint.untrusted.torch_archive import Archive


@pytest.mark.parametrize("write", [write_meta, write_dcp])
@pytest.mark.parametrize(
    ("bend", "compressed", "said"),
    [
        (lambda entries: entries.update({"byteorder": b"big"}), "", "instead of little"),
        (lambda entries: None, "data/0", "data/0 is compressed"),
        (lambda entries: entries.pop("data/0"), "", "its storage is not in the file"),
        (lambda entries: entries.update({"data/0": bytes(31)}), "", "damaged"),
        (lambda entries: entries.update({"data/0": bytes(33)}), "", "damaged"),
    ],
)
def test_archive_whose_directory_and_pickle_disagree_is_refused(
    tmp_path: Path,
    write: Callable[[Path, Bend, str], None],
    bend: Bend,
    compressed: str,
    said: str,
) -> None:
    write(tmp_path, bend, compressed)
    assert said in open_checkpoint(tmp_path).errors[0].message


@pytest.mark.parametrize("write", [write_meta, write_dcp])
def test_archive_repacked_by_another_tool_is_read(
    tmp_path: Path, write: Callable[[Path, Bend, str], None]
) -> None:
    """Torch aligns records; places are those of the directory, aligned or not."""
    write(tmp_path, lambda entries: None, "")
    (piece,) = open_checkpoint(tmp_path).tensors["norm.weight"].pieces
    assert piece.local_file.read_bytes()[piece.offset :][:32] == torch.ones(8).numpy().tobytes()


def test_wrong_local_header_offset_is_refused(tmp_path: Path) -> None:
    content = bytearray(saved(torch.ones(8)))
    content[0] ^= 1
    (tmp_path / "file").write_bytes(content)
    with (
        open(tmp_path / "file", "rb") as file,
        pytest.raises(ValueError, match=r"record \w+/data\.pkl is not where its directory says"),
    ):
        Archive(LocalBytes(file), 0, len(content))


def test_tensor_offsets_equal_those_of_torch(tmp_path: Path) -> None:
    tensor = torch.randn(8, 8)
    (tmp_path / "file").write_bytes(b"before" + saved({"a": tensor}) + b"after")
    with open(tmp_path / "file", "rb") as file:
        archive = Archive(LocalBytes(file), 6, (tmp_path / "file").stat().st_size - 11)
        found = archive.tensor(archive.value["a"])
        file.seek(found.offset)
        assert file.read(tensor.nbytes) == tensor.numpy().tobytes()
