"""Archives whose directory tells another story than their pickle: refused, in both formats."""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from llamaconv import open_checkpoint
from llamaconv.formats.torch_archive import records

Bend = Callable[[dict[str, bytes]], object]


def bent(content: bytes, bend: Bend, compressed: str = "") -> bytes:
    """An archive of torch's taken apart, bent, and put together again by zipfile."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    bend(entries)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, value in entries.items():
            kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", value, compress_type=kind)
    return made.getvalue()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write_meta(folder: Path, bend: Bend, compressed: str = "") -> None:
    content = saved({"norm.weight": torch.ones(8), "output.weight": torch.ones(8, 8)})
    (folder / "consolidated.00.pth").write_bytes(bent(content, bend, compressed))
    (folder / "params.json").write_text("{}")


def write_dcp(folder: Path, bend: Bend, compressed: str = "") -> None:
    save({"norm.weight": torch.ones(8)}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    content = bent(saved(torch.ones(8)), bend, compressed)
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, offset=3, length=len(content))
        (folder / place.relative_path).write_bytes(b"\0\0\0" + content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("write", [write_meta, write_dcp])
@pytest.mark.parametrize(
    ("bend", "compressed", "said"),
    [
        (lambda entries: entries.update({"byteorder": b"big"}), "", "endian; little was expected"),
        (lambda entries: None, "data/0", "record data/0 is compressed"),
        (lambda entries: entries.pop("data/0"), "", "damaged"),
        (lambda entries: entries.update({"data/0": bytes(31)}), "", "damaged"),
        (lambda entries: entries.update({"data/0": bytes(33)}), "", "damaged"),
    ],
)
def test_only_what_directory_and_pickle_agree_on_is_read(
    tmp_path: Path,
    write: Callable[[Path, Bend, str], None],
    bend: Bend,
    compressed: str,
    said: str,
) -> None:
    write(tmp_path, bend, compressed)
    assert said in open_checkpoint(tmp_path).errors[0].message


def test_an_archive_that_another_tool_packed_again(tmp_path: Path) -> None:
    """Torch aligns records and computes their places from that; a DCP's entry has only one."""
    write_dcp(tmp_path, lambda entries: None)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.errors
    (piece,) = checkpoint.tensors["norm.weight"].pieces
    assert piece.local_file.read_bytes()[piece.offset :][:32] == torch.ones(8).numpy().tobytes()
    (tmp_path / ".metadata").unlink()
    write_meta(tmp_path, lambda entries: None)
    assert "packed by another tool than torch" in open_checkpoint(tmp_path).errors[0].message


@pytest.mark.parametrize("at", [0, 26, 31])
def test_a_local_header_that_is_not_where_the_directory_says(tmp_path: Path, at: int) -> None:
    content = bytearray(saved(torch.ones(8)))
    content[at] ^= 1
    (tmp_path / "file").write_bytes(content)
    with (
        open(tmp_path / "file", "rb") as file,
        pytest.raises(ValueError, match=r"record data\.pkl is not where its directory says"),
    ):
        records(file)


def test_records_are_where_the_library_finds_them(tmp_path: Path) -> None:
    tensor = torch.randn(8, 8)
    (tmp_path / "file").write_bytes(b"before" + saved({"a": tensor}) + b"after")
    with open(tmp_path / "file", "rb") as file:
        begin, length = records(file, 6, (tmp_path / "file").stat().st_size - 11)["data/0"]
        file.seek(6 + begin)
        assert file.read(length) == tensor.numpy().tobytes()
