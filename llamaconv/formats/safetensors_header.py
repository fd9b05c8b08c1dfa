"""The header of one ``.safetensors`` file, checked against the file before anything is read.

The safetensors library gives names and values but not the offsets of the bytes, and brings
numpy or torch along; a header is 8 bytes of length and JSON, so it is read here. Format:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from llamaconv.files import parse_json, what_it_is
from llamaconv.pieces import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.problems import Problem, printable
from llamaconv.remote import Remote

# The format's own limit on a header (safetensors' MAX_HEADER_SIZE).
_MOST_HEADER_BYTES = 100_000_000
# Enough to see what a file is that is no safetensors file.
_LOOK_BYTES = 512

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_header(path: Path) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors of one file, and every problem found. Reads the header only."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            start += file.read((header_end(start, file_bytes) or _LOOK_BYTES) - len(start))
    except OSError as error:
        return {}, [Problem(f"{path}: {error.strerror or error}")]
    return parse_header(path, start, file_bytes)


def header_end(start: bytes, file_bytes: int) -> int | None:
    """Where the header of a file of ``file_bytes`` ends, in bytes from the file's start.

    ``start`` is its first 8 bytes or more. None where this can be no safetensors file.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and 2 <= length <= min(_MOST_HEADER_BYTES, file_bytes - 8):
        return 8 + length
    return None


def parse_header(
    path: Path | Remote, start: bytes, file_bytes: int
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Tensors of a file of ``file_bytes``, and every problem found.

    ``start`` is the file's to `header_end` at least, or some hundred bytes where there is none.
    """
    end = header_end(start, file_bytes)
    if end is None:
        return {}, [_not_safetensors(path, start[:_LOOK_BYTES], file_bytes)]
    try:
        header = parse_json(start[8:end])
    except ValueError as error:
        reason = what_it_is(start[:_LOOK_BYTES]) or f"the header is not valid JSON: {error}"
        return {}, [Problem(f"{path}: {reason}")]
    if not isinstance(header, dict):
        return {}, [Problem(f"{path}: the header is not a JSON object")]
    return _tensors(path, header, end, file_bytes)


def _not_safetensors(path: Path | Remote, start: bytes, file_bytes: int) -> Problem:
    length = int.from_bytes(start[:8], "little")
    reason = what_it_is(start)
    if reason is None and file_bytes >= 8 and length > _MOST_HEADER_BYTES:
        reason = (
            f"the header would be {length} bytes long, the format allows {_MOST_HEADER_BYTES}; "
            "this is no safetensors file, or its start is damaged"
        )
    if reason is None:
        reason = (
            f"the file is cut inside its header: {file_bytes} bytes found, at least {length + 8} "
            "expected. Download it again"
        )
    return Problem(f"{path}: {reason}", (path.name,))


def _tensors(
    path: Path | Remote, header: dict[str, Any], data_start: int, file_bytes: int
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, begin, end = _entry(entry)
        except ValueError as error:
            problems.append(Problem(f"{path}: tensor {printable(name)}: {error}", (name,)))
            continue
        spans.append((begin, end, name))
        piece = Piece(path, data_start + begin, (0,) * len(shape), shape)
        tensors[name] = TensorInfo(name, dtype, shape, (piece,))
    for name, start in _starts(header).items():
        if name in tensors and len(start) == len(tensors[name].shape):
            tensors[name] = _part(tensors[name], start)
    data_bytes = 0
    # The bytes follow each other without a gap or an overlap (the format's own rule).
    for begin, end, name in sorted(spans):
        if begin != data_bytes:
            what = "overlaps the one before" if begin < data_bytes else "leaves a gap before it"
            problems.append(
                Problem(f"{path}: tensor {name} {what}; the header is damaged", (name,))
            )
        data_bytes = max(data_bytes, end)
    expected = data_start + data_bytes
    if file_bytes != expected and not problems:
        missing = expected - file_bytes
        cause = (
            f"{missing} bytes are missing: the file was cut, download it again"
            if missing > 0
            else f"{-missing} bytes too many: the file was overwritten or appended to"
        )
        problems.append(
            Problem(f"{path}: {expected} bytes expected, {file_bytes} found; {cause}", (path.name,))
        )
    return tensors, problems


def _starts(header: dict[str, Any]) -> dict[str, list[int]]:
    """Where each tensor of the file sits in a larger one, as torch's ranks note it.

    HuggingFaceStorageWriter (torch/distributed/checkpoint/_hf_utils.py) puts the offsets of a
    part beside its bytes; other files have none.
    """
    try:
        noted = parse_json(header["__metadata__"]["DCP_SHARDING_INFO"].encode())
        starts = {name: entry["saved_offsets"] for name, entry in noted.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {name: start for name, start in starts.items() if _sizes(start)}


def _part(tensor: TensorInfo, start: list[int]) -> TensorInfo:
    """``tensor`` as a part of one that reaches at least to its end."""
    piece = replace(tensor.pieces[0], start=tuple(start))
    shape = tuple(map(sum, zip(start, tensor.shape, strict=True)))
    return replace(tensor, shape=shape, pieces=(piece,), is_part=True)


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, or ``ValueError``."""
    if not isinstance(entry, dict):
        raise ValueError("its header entry is not an object")
    stored, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(stored, str) or stored not in DTYPES:
        raise ValueError(f"dtype {stored!r} is not known; quantised or newer than this reader")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError("its shape or data_offsets are not lists of whole numbers")
    dtype, (begin, end) = DTYPES[stored], offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{end - begin} bytes for shape {shape} of {dtype}, "
            f"{prod(shape) * DTYPE_BYTES[dtype]} expected"
        )
    return dtype, tuple(shape), begin, end


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
