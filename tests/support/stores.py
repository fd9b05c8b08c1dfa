"""Folders that torch_checkpointing wrote, out of the archive, and ways to bend their metadata."""

from __future__ import annotations

import copy
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
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


ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**63, 10**30, 0.5, float("nan"), b"x", (), ("a",), [], [0] * 9),
    *(
        "",
        "..",
        "a/b",
        "Shard",
        "torch.float32",
        "torch.int4",
        "\ud800",
        "[",
        '["a"]',
        {},
        {"a": 1},
    ),
)


def mangled(value: Any, rng: random.Random) -> Any:
    """The same value with one place in it of another kind, taken out, or like another place."""
    places = list(_places(value))
    path = rng.choice(places)
    if path and rng.random() < 0.2:
        parent = _at(value, path[:-1])
        inside = dict(parent) if type(parent) is dict else list(parent)
        del inside[path[-1]]
        return _with(value, path[:-1], inside if type(parent) is dict else type(parent)(inside))
    other = _at(value, rng.choice(places)) if rng.random() < 0.3 else rng.choice(ODD)
    return _with(value, path, copy.deepcopy(other))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple):
        entries = enumerate(value)
    for key, inside in entries:
        yield from _places(inside, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    key, *rest = path
    made = dict(value) if type(value) is dict else list(value)
    made[key] = _with(made[key], tuple(rest), new)
    return made if type(value) is dict else type(value)(made)
