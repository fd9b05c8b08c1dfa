"""Folders that torch_checkpointing wrote, out of the archive, and ways to bend their metadata."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).parents[1] / "data" / "torch_checkpointing.zip"
"""What it holds is said in make_torch_checkpointing.py, next to it."""


def unpack(home: Path) -> Path:
    """Writes the folders of the archive to a new folder."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    return home


def bend(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Reads ``metadata.pkl``, lets ``change`` edit it, and writes it."""
    path = folder / "metadata.pkl"
    content = pickle.loads(path.read_bytes())
    changed = change(content)
    path.write_bytes(pickle.dumps(content if changed is None else changed))


def tensor_in(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    """How one of the model's tensors is cut."""
    (group,) = metadata["metadata"]["model"]["nested_path_to_metadata"][f'["{name}"]']
    packed: dict[str, Any] = group["sharding_metadata"]
    return packed
