"""Archives of torch's, taken apart, bent and put together again, in both formats that hold them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import save

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
