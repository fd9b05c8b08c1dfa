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
from llamaconv.formats.torch_archive import Archive

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
        (lambda entries: entries.update({"byteorder": b"big"}), "", "little was expected"),
        (lambda entries: None, "data/0", "data/0 is compressed"),
        (lambda entries: entries.pop("data/0"), "", "its storage is not in the file"),
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


@pytest.mark.parametrize("write", [write_meta, write_dcp])
def test_an_archive_that_another_tool_packed_again(
    tmp_path: Path, write: Callable[[Path, Bend, str], None]
) -> None:
    """Torch aligns records; places are those of the directory, aligned or not."""
    write(tmp_path, lambda entries: None, "")
    (piece,) = open_checkpoint(tmp_path).tensors["norm.weight"].pieces
    assert piece.local_file.read_bytes()[piece.offset :][:32] == torch.ones(8).numpy().tobytes()


def test_a_local_header_that_is_not_where_the_directory_says(tmp_path: Path) -> None:
    content = bytearray(saved(torch.ones(8)))
    content[0] ^= 1
    (tmp_path / "file").write_bytes(content)
    with (
        open(tmp_path / "file", "rb") as file,
        pytest.raises(ValueError, match=r"record \w+/data\.pkl is not where its directory says"),
    ):
        Archive(file, 0, len(content))


def test_tensors_are_where_torch_finds_them(tmp_path: Path) -> None:
    tensor = torch.randn(8, 8)
    (tmp_path / "file").write_bytes(b"before" + saved({"a": tensor}) + b"after")
    with open(tmp_path / "file", "rb") as file:
        archive = Archive(file, 6, (tmp_path / "file").stat().st_size - 11)
        found = archive.tensor(archive.value["a"])
        file.seek(found.offset)
        assert file.read(tensor.nbytes) == tensor.numpy().tobytes()
