"""Damage for ``test_fuzz``: what disks, downloads and strangers do to a folder.

Unlike the mutations of ``test_mutations`` these need not be small and know nothing of tensors;
they draw from hypothesis, so that a failing example can be repeated.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from llamaconv import RefusedError
from llamaconv.checkpoint.untrusted.dcp_metadata import read_metadata

Damage = Callable[[Path, DataObject], None]


def _file(folder: Path, data: DataObject) -> Path:
    return data.draw(st.sampled_from(sorted(f for f in folder.rglob("*") if f.is_file())))


def flip_bytes(folder: Path, data: DataObject) -> None:
    file = _file(folder, data)
    content = bytearray(file.read_bytes())
    if not content:
        return
    # The beginning and the end are where headers and directories are.
    near = st.integers(0, min(400, len(content) - 1))
    places = st.one_of(
        near, near.map(lambda at: len(content) - 1 - at), st.integers(0, len(content) - 1)
    )
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)


def cut(folder: Path, data: DataObject) -> None:
    file = _file(folder, data)
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])


def extend(folder: Path, data: DataObject) -> None:
    file = _file(folder, data)
    file.write_bytes(file.read_bytes() + data.draw(st.binary(min_size=1, max_size=40)))


def cut_out_or_double(folder: Path, data: DataObject) -> None:
    """A run of bytes is lost, or there twice: everything behind it moves."""
    file = _file(folder, data)
    content = file.read_bytes()
    begin = data.draw(st.integers(0, len(content)))
    run = content[begin : begin + data.draw(st.integers(1, 64))]
    middle = data.draw(st.sampled_from((b"", run + run)))
    file.write_bytes(content[:begin] + middle + content[begin + len(run) :])


def swap_files(folder: Path, data: DataObject) -> None:
    one, other = _file(folder, data), _file(folder, data)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def remove(folder: Path, data: DataObject) -> None:
    _file(folder, data).unlink()


NAMES = (
    ".metadata",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "config.json",
    "params.json",
    "consolidated.00.pth",
    "consolidated.7.pth",
    "__0_0.distcp",
    "llamaconv.json",
    "adapter_config.json",
    "x\n.safetensors",
)


def rename(folder: Path, data: DataObject) -> None:
    _file(folder, data).rename(folder / data.draw(st.sampled_from(NAMES)))


def duplicate(folder: Path, data: DataObject) -> None:
    file, name = _file(folder, data), data.draw(st.sampled_from(NAMES))
    if file != folder / name:
        shutil.copyfile(file, folder / name)


def folder_in_place_of_a_file(folder: Path, data: DataObject) -> None:
    file = _file(folder, data)
    file.unlink()
    file.mkdir()


# JSON, at the level of its structure.

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "x" * 300),
    *([], [0], [[]], [1, -1], [2**62, 2**62], {}, {"a": 1}, {"rope_type": "llama3"}),
)
odd = st.one_of(st.sampled_from(ODD), st.integers(-3, 300), st.text(max_size=4))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside parsed JSON, itself first."""
    entries: Any = ()
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(found for name, inside in entries for found in paths(inside, (*path, name)))]


def mangle_value(value: Any, data: DataObject) -> Any:
    """One place of parsed JSON changed, taken out, renamed, or exchanged with another."""
    places = [path for path in paths(value) if path]
    if not places:
        return data.draw(odd)
    path = data.draw(st.sampled_from(places))
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    how = data.draw(st.sampled_from(("odd", "remove", "rename", "exchange", "nest")))
    if how == "odd":
        parent[path[-1]] = data.draw(odd)
    elif how == "remove":
        del parent[path[-1]]
    elif how == "nest":
        parent[path[-1]] = {"a": parent[path[-1]]}
    elif how == "rename" and isinstance(parent, dict):
        parent[data.draw(st.one_of(st.sampled_from(sorted(parent)), st.text(max_size=5)))] = (
            parent.pop(path[-1])
        )
    else:
        names = list(parent) if isinstance(parent, dict) else range(len(parent))
        other = data.draw(st.sampled_from(names))
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    return value


def mangle_json(folder: Path, data: DataObject) -> None:
    files = sorted(file for file in folder.glob("*.json") if file.is_file())
    if files:
        file = data.draw(st.sampled_from(files))
        try:
            value = json.loads(file.read_bytes())
        except ValueError:
            return
        file.write_text(json.dumps(mangle_value(value, data)), encoding="utf-8")


def mangle_header(folder: Path, data: DataObject) -> None:
    """The JSON of a safetensors header, with a length that fits it again."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        return
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
    except ValueError:
        return
    text = json.dumps(mangle_value(header, data)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


# Pickles, an opcode at a time, and the records of an archive.


def mangle_pickle(content: bytes, data: DataObject) -> bytes:
    """One operation of a pickle left out, doubled, exchanged, or given another argument."""
    try:
        starts = [at for _, _, at in pickletools.genops(content)]
    except Exception:  # damaged before
        return content
    operations = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    at, other = (data.draw(st.integers(0, len(operations) - 1)) for _ in range(2))
    how = data.draw(st.sampled_from(("remove", "double", "exchange", "argument")))
    if how == "remove":
        del operations[at]
    elif how == "double":
        operations.insert(at, operations[at])
    elif how == "exchange":
        operations[at], operations[other] = operations[other], operations[at]
    else:
        changed = bytearray(operations[at])
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        operations[at] = bytes(changed)
    return b"".join(operations)


def mangle_metadata(folder: Path, data: DataObject) -> None:
    file = folder / ".metadata"
    if file.is_file():
        file.write_bytes(mangle_pickle(file.read_bytes(), data))


def bend_metadata(folder: Path, data: DataObject) -> None:
    """A value somewhere in the metadata's objects is another."""
    file = folder / ".metadata"
    try:
        read_metadata(folder)  # nothing runs from what this has admitted
        metadata = pickle.loads(file.read_bytes())
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        name = data.draw(st.sampled_from(sorted(entries)))
        place = storage[data.draw(st.sampled_from(list(storage)))]
    except (RefusedError, LookupError):  # damaged before, or another format
        return
    holder = data.draw(
        st.sampled_from(
            (metadata, entries[name], entries[name].properties, place, entries[name].chunks[0])
        )
    )
    field = data.draw(st.sampled_from(sorted(vars(holder))))
    others = [v for h in (metadata, entries[name], place) for v in vars(h).values()]
    setattr(holder, field, data.draw(st.one_of(odd, st.sampled_from(others))))
    try:
        file.write_bytes(pickle.dumps(metadata))
    except Exception:  # what torch itself cannot pickle
        return


def repack(folder: Path, data: DataObject) -> None:
    """An archive of Meta's taken apart by zipfile, and packed again with a record changed."""
    files = sorted(file for file in folder.glob("*.pth") if file.is_file())
    if not files:
        return
    file = data.draw(st.sampled_from(files))
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: _stored(file, info) for info in archive.infolist()}
    except Exception:  # damaged before
        return
    name = data.draw(st.sampled_from(sorted(records)))
    how = data.draw(
        st.sampled_from(("pickle", "remove", "cut", "extend", "rename", "big", "nothing"))
    )
    pickled = next((n for n in records if n.endswith("/data.pkl")), name)
    if how == "pickle":
        records[pickled] = mangle_pickle(records[pickled], data)
    elif how == "remove":
        del records[name]
    elif how == "cut":
        records[name] = records[name][: data.draw(st.integers(0, len(records[name])))]
    elif how == "extend":
        records[name] += data.draw(st.binary(min_size=1, max_size=9))
    elif how == "rename":
        records[data.draw(st.text(max_size=4)) + name] = records.pop(name)
    elif how == "big":
        records[pickled.replace("data.pkl", "byteorder")] = b"big"
    kind = data.draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    with zipfile.ZipFile(file, "w", kind) as archive:
        for record, value in records.items():
            archive.writestr(record, value)


def _stored(file: Path, info: zipfile.ZipInfo) -> bytes:
    """Of a record of ours, whose checksum is of no data: past what zipfile would check."""
    content = file.read_bytes()
    name, extra = (
        int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28)
    )
    begin = info.header_offset + 30 + name + extra
    return content[begin : begin + info.file_size]


ALL: tuple[Damage, ...] = (
    flip_bytes,
    cut,
    extend,
    cut_out_or_double,
    swap_files,
    remove,
    rename,
    duplicate,
    folder_in_place_of_a_file,
    mangle_json,
    mangle_header,
    mangle_metadata,
    bend_metadata,
    repack,
)
