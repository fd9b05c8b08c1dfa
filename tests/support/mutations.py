"""Small wrongs done to a good target in place, one at a time, for ``test_mutations``.

Each takes a folder and a source of random numbers, and returns what it did, in words, or None
where the folder gives it nothing to do (no second file to swap with).
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from llamaconv import open_checkpoint
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.model.names import identify

Mutation = Callable[[Path, random.Random], str | None]


# In the bytes of tensors, at the places where the target's own reader finds them.


def flip_one_bit(folder: Path, rng: random.Random) -> str:
    tensor, piece = _any_piece(open_checkpoint(folder), rng)
    at, bit = rng.randrange(_length(tensor, piece)), rng.randrange(8)
    content = _bytes(tensor, piece)
    content[at] ^= 1 << bit
    _put(piece, content)
    return f"bit {bit} of byte {at} of {tensor.name}"


def zero_a_run(folder: Path, rng: random.Random) -> str | None:
    tensor, piece = _any_piece(open_checkpoint(folder), rng)
    content = _bytes(tensor, piece)
    at = rng.randrange(len(content))
    end = min(len(content), at + rng.choice((1, 8, 64)))
    if not any(content[at:end]):
        return None
    content[at:end] = bytes(end - at)
    _put(piece, content)
    return f"bytes {at} to {end} of {tensor.name} zeroed"


def swap_two_tensors(folder: Path, rng: random.Random) -> str:
    """The bytes of two tensors of the same shape, piece by piece."""
    checkpoint = open_checkpoint(folder)
    by_shape: dict[tuple[int, ...], list[TensorInfo]] = {}
    for tensor in checkpoint.tensors.values():
        by_shape.setdefault(tensor.shape, []).append(tensor)
    one, other = rng.sample(rng.choice([ts for ts in by_shape.values() if len(ts) > 1]), 2)
    for here, there in zip(one.pieces, other.pieces, strict=True):
        if here.shape != there.shape:  # wo is cut by columns where wq is cut by rows
            return swap_two_tensors(folder, rng)
    for here, there in zip(one.pieces, other.pieces, strict=True):
        first, second = _bytes(one, here), _bytes(other, there)
        _put(here, second)
        _put(there, first)
    return f"{one.name} and {other.name} swapped"


def swap_two_rows(folder: Path, rng: random.Random) -> str | None:
    tensor, piece = _any_piece(open_checkpoint(folder), rng)
    n_rows, row = piece.shape[0], _length(tensor, piece) // piece.shape[0]
    if n_rows < 2:
        return None
    one, other = rng.sample(range(n_rows), 2)
    content = _bytes(tensor, piece)
    first, second = (content[at * row : (at + 1) * row] for at in (one, other))
    if first == second:
        return None
    content[one * row : (one + 1) * row] = second
    content[other * row : (other + 1) * row] = first
    _put(piece, content)
    return f"rows {one} and {other} of {tensor.name}{list(piece.start)} swapped"


def reorder_one_head(folder: Path, rng: random.Random) -> str | None:
    """The rows of one head of q or k as the other layout has them."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params is not None
    size = checkpoint.params.head_dim
    names = [name for name in checkpoint.tensors if _role(checkpoint, name) in ("wq", "wk")]
    tensor = checkpoint.tensors[rng.choice(names)]
    piece = rng.choice(tensor.pieces)
    heads = [
        row for row in range(0, piece.shape[0] - size + 1) if (piece.start[0] + row) % size == 0
    ]
    if not heads:
        return None
    first, row = rng.choice(heads), _length(tensor, piece) // piece.shape[0]
    content = _bytes(tensor, piece)
    rows = [bytes(content[at * row : (at + 1) * row]) for at in range(first, first + size)]
    half = size // 2
    towards = rng.choice(("interleaved", "half_split"))
    if towards == "interleaved":
        rows = [rows[i // 2 + half * (i % 2)] for i in range(size)]
    else:
        rows = [rows[2 * (i % half) + i // half] for i in range(size)]
    content[first * row : (first + size) * row] = b"".join(rows)
    _put(piece, content)
    return f"the head at row {first} of {tensor.name}{list(piece.start)} made {towards}"


# Of whole tensors: their names, dtypes and shapes.


def lose_a_tensor(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng)
    _edit_tensors(folder, name, lambda tensor: None)
    return f"{name} left out"


def rename_a_tensor(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng)
    other = rng.choice((f"{name}s", name[1:], name.replace("w", "v"), name.replace("t", "tt", 1)))
    _edit_tensors(folder, name, lambda tensor: tensor, other)
    return f"{name} renamed to {other}"


def another_dtype(folder: Path, rng: random.Random) -> str:
    """The same numbers as far as another dtype holds them, or the same bytes under its name."""
    name, cast = _any_name(folder, rng), rng.random() < 0.5
    dtype = rng.choice((torch.float32, torch.float64) if cast else (torch.float16, torch.int16))
    _edit_tensors(folder, name, lambda t: t.to(dtype) if cast else t.view(dtype))
    return f"{name} as {dtype}, {'cast' if cast else 'the same bytes'}"


def another_shape(folder: Path, rng: random.Random) -> str:
    """The same elements, or the last row left out."""
    name, cut = _any_name(folder, rng), rng.random() < 0.5
    _edit_tensors(folder, name, lambda t: t[:-1].clone() if cut else t.unflatten(0, (1, -1)))
    return f"{name} {'without its last row' if cut else 'with an axis more'}"


# Of files.


def swap_two_files(folder: Path, rng: random.Random) -> str | None:
    files = _weight_files(folder)
    if len(files) < 2:
        return None
    one, other = rng.sample(files, 2)
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.name} and {other.name} swapped"


def cut_a_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(_files(folder))
    content = file.read_bytes()
    length = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content))))
    file.write_bytes(content[:length])
    return f"{file.name} cut from {len(content)} to {length} bytes"


def extend_a_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(_files(folder))
    more = rng.choice((b"\0", b" ", b"\n", rng.randbytes(100), file.read_bytes()))
    file.write_bytes(file.read_bytes() + more)
    return f"{file.name} with {len(more)} bytes more"


def remove_a_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(_files(folder))
    file.unlink()
    return f"{file.name} removed"


def rename_a_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(_files(folder))
    other = file.with_name(rng.choice((f"other{file.suffix}", f"{file.name}.bak")))
    file.rename(other)
    return f"{file.name} renamed to {other.name}"


def copy_over_a_file(folder: Path, rng: random.Random) -> str | None:
    files = _weight_files(folder)
    if len(files) < 2:
        return None
    one, other = rng.sample(files, 2)
    other.write_bytes(one.read_bytes())
    return f"{one.name} over {other.name}"


def flip_any_bit(folder: Path, rng: random.Random) -> str:
    """Of any file, wherever: an envelope, a header, a checksum, a pickle, a receipt."""
    file = rng.choice(_files(folder))
    content = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} of {file.name}"


def change_an_envelope(folder: Path, rng: random.Random) -> str:
    """A byte between the tensors' own: of a zip's records, of a pickle, of a header."""
    checkpoint = open_checkpoint(folder)
    file = rng.choice(_weight_files(folder))
    content = bytearray(file.read_bytes())
    payload = [
        (piece.offset, piece.offset + _length(tensor, piece))
        for tensor in checkpoint.tensors.values()
        for piece in tensor.pieces
        if piece.file == file
    ]
    outside = [at for at in range(len(content)) if not any(a <= at < b for a, b in payload)]
    at, value = rng.choice(outside), rng.randrange(256)
    content[at] ^= value or 1
    file.write_bytes(content)
    return f"byte {at} of {file.name} is {content[at]}"


# Of what is said beside the weights.


def edit_an_entry(folder: Path, rng: random.Random) -> str:
    """One leaf of one JSON file: another value, or the whole entry left out."""
    file = rng.choice(sorted(folder.glob("*.json")))
    content = json.loads(file.read_text())
    path = rng.choice(list(_leaves(content)))
    inside = content
    for step in path[:-1]:
        inside = inside[step]
    before = inside[path[-1]]
    if rng.random() < 0.2:
        del inside[path[-1]]
        done = "left out"
    else:
        inside[path[-1]] = _another(before, rng)
        done = f"{before!r} to {inside[path[-1]]!r}"
    file.write_text(json.dumps(content))
    return f"{file.name} {'/'.join(map(str, path))}: {done}"


def more_white_space(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.glob("*.json")))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=rng.choice((None, 1, 7))) + "\n" * rng.randrange(3))
    return f"{file.name} laid out otherwise"


def swap_two_chunks(folder: Path, rng: random.Random) -> str | None:
    """Two chunks of a DCP, or two shards of an index, point to each other's bytes."""
    if (folder / ".metadata").exists():
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        storage = metadata.storage_data
        one, other = rng.sample(list(storage), 2)
        storage[one], storage[other] = storage[other], storage[one]
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return f"{one.fqn}{list(one.offset)} and {other.fqn}{list(other.offset)} swapped"
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None
    content = json.loads(index.read_text())
    names = content["weight_map"]
    one, other = rng.sample(list(names), 2)
    if names[one] == names[other]:
        return None
    names[one], names[other] = names[other], names[one]
    index.write_text(json.dumps(content))
    return f"the files of {one} and {other} swapped in the index"


ALL: tuple[Mutation, ...] = (
    flip_one_bit,
    zero_a_run,
    swap_two_tensors,
    swap_two_rows,
    reorder_one_head,
    lose_a_tensor,
    rename_a_tensor,
    another_dtype,
    another_shape,
    swap_two_files,
    cut_a_file,
    extend_a_file,
    remove_a_file,
    rename_a_file,
    copy_over_a_file,
    flip_any_bit,
    change_an_envelope,
    edit_an_entry,
    more_white_space,
    swap_two_chunks,
)


def mutate(folder: Path, rng: random.Random) -> tuple[str, str]:
    """One random mutation of ``folder``: the name of its kind, and what it did."""
    while True:
        kind = rng.choice(ALL)
        if done := kind(folder, rng):
            return kind.__name__, done


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _weight_files(folder: Path) -> list[Path]:
    return [f for f in _files(folder) if f.suffix in (".distcp", ".safetensors", ".pth")]


def _any_piece(checkpoint: Checkpoint, rng: random.Random) -> tuple[TensorInfo, Piece]:
    tensor = rng.choice(list(checkpoint.tensors.values()))
    return tensor, rng.choice(tensor.pieces)


def _any_name(folder: Path, rng: random.Random) -> str:
    return rng.choice(list(open_checkpoint(folder).tensors))


def _role(checkpoint: Checkpoint, name: str) -> str:
    known = identify(name, checkpoint.naming)
    assert known is not None
    return known[0].name


def _length(tensor: TensorInfo, piece: Piece) -> int:
    return prod(piece.shape) * DTYPE_BYTES[tensor.dtype]


def _bytes(tensor: TensorInfo, piece: Piece) -> bytearray:
    with open(piece.local_file, "rb") as file:
        file.seek(piece.offset)
        return bytearray(file.read(_length(tensor, piece)))


def _put(piece: Piece, content: bytes | bytearray) -> None:
    with open(piece.local_file, "r+b") as file:
        file.seek(piece.offset)
        file.write(content)


def _leaves(content: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(content, dict | list) and content:
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        for name, inside in entries:
            yield from _leaves(inside, (*path, name))
    else:
        yield path


def _another(value: Any, rng: random.Random) -> Any:
    """A value of the same type that is not the same, or one of another type."""
    if rng.random() < 0.15:
        return rng.choice([v for v in (None, -1, "x", [], {}, True, 1e400) if v != value])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value * 2 + 1, value / 2 + 1, -value - 1))
    if isinstance(value, str):
        choices = [w for w in _WORDS if value in w for w in w if w != value]
        return rng.choice(choices or [value[:-1], f"{value}0", value[::-1] + "."])
    return rng.choice((0, "", {"factor": 8.0}, [value]))


# Words that could stand in each other's place.
_WORDS = (
    ("interleaved", "half_split"),
    ("titan-0.3", "titan-0.2", "titan-2024"),
    ("bfloat16", "float16", "float32", "keep"),
    ("copy", "reorder", "cast", "tie"),
    ("huggingface", "meta", "dcp"),
    ("auto", "embedding", "head", "untie"),
)


# Tensors edited in the format's own way; everything else stays to the byte where it can.


def _edit_tensors(
    folder: Path,
    name: str,
    edit: Callable[[torch.Tensor], torch.Tensor | None],
    other: str | None = None,
) -> None:
    if (folder / ".metadata").exists():
        _edit_dcp(folder, name, edit, other or name)
    elif list(folder.glob("*.pth")):
        for file in folder.glob("*.pth"):
            state = torch.load(file, weights_only=True)
            made = edit(state.pop(name))
            state |= {} if made is None else {other or name: made}
            torch.save(state, file)
    else:
        _edit_safetensors(folder, name, edit, other or name)


def _edit_safetensors(folder: Path, name: str, edit: Any, other: str) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = open_checkpoint(folder).tensors[name].files
    state = load_file(folder / file)
    made = edit(state.pop(name))
    state |= {} if made is None else {other: made}
    save_file(state, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        content["weight_map"] |= {} if made is None else {other: file}
        index.write_text(json.dumps(content))


def _edit_dcp(folder: Path, name: str, edit: Any, other: str) -> None:
    """A new file for the pieces of the one tensor, and the metadata that points there."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata.pop(name)
    storage = metadata.storage_data
    places = {index: storage.pop(index) for index in list(storage) if index.fqn == name}
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    from support.folders import load_dcp

    whole = load_dcp(folder)[name]
    made = edit(whole)
    if made is not None:
        old = list(entry.chunks)
        same_shape = made.shape == whole.shape
        chunks = (
            old
            if same_shape
            else [replace(old[0], offsets=torch.Size([0] * made.ndim), sizes=made.shape)]
        )
        with open(folder / "__1_0.distcp", "wb") as file:
            for number, chunk in enumerate(chunks):
                part = made[
                    tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                ]
                begin = file.tell()
                torch.save(part.clone(), file)
                place = next(iter(places.values()))
                place = replace(
                    place, relative_path="__1_0.distcp", offset=begin, length=file.tell() - begin
                )
                storage[MetadataIndex(other, chunk.offsets, number)] = place
        properties = replace(entry.properties, dtype=made.dtype)
        metadata.state_dict_metadata[other] = replace(
            entry, properties=properties, size=made.shape, chunks=chunks
        )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
