"""The header of one ``.safetensors`` file, checked against the file before anything is read.

The safetensors library gives names and values but not the offsets of the bytes, and needs numpy or
torch. A header is 8 bytes of length and JSON, so it is read here. Format:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from llamaconv.checkpoint.tensors import DTYPE_BYTES, Location, Piece, TensorInfo
from llamaconv.checkpoint.untrusted.files import ByteSource, parse_json, what_it_is
from llamaconv.checkpoint.untrusted.values import sizes
from llamaconv.report.errors import Problem, printable

# The format's own limit on a header (safetensors' MAX_HEADER_SIZE).
_MOST_HEADER_BYTES = 100_000_000
# Enough to guess what another file is.
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


def read_safetensors_header(
    path: Location, source: ByteSource
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Return the tensors of one file, and every problem found. Only the header is read.

    Args:
        path: The file, for messages and pieces.
        source: Its bytes.

    Raises:
        OSError: It cannot be read.
    """
    start = source.read(0, 8)
    end = header_end(start, source.n_bytes) or _LOOK_BYTES
    return parse_header(path, start + source.read(len(start), end - len(start)), source.n_bytes)


def header_end(start: bytes, file_bytes: int) -> int | None:
    """Return the length of a file's header in bytes, with the 8 bytes in front.

    Args:
        start: The first 8 bytes of the file, or more.
        file_bytes: The length of the file.

    Returns:
        The length, or None if this cannot be a safetensors file.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and 2 <= length <= min(_MOST_HEADER_BYTES, file_bytes - 8):
        return 8 + length
    return None


def parse_header(
    path: Location, start: bytes, file_bytes: int
) -> tuple[dict[str, TensorInfo], list[Problem]]:
    """Parse the header of a file.

    Args:
        path: The file, for messages and pieces.
        start: Its bytes up to `header_end` at least, or some hundred bytes if that is None.
        file_bytes: Its length.

    Returns:
        The tensors by name, and every problem found.
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


def _not_safetensors(path: Location, start: bytes, file_bytes: int) -> Problem:
    length = int.from_bytes(start[:8], "little")
    reason = what_it_is(start)
    if reason is None and file_bytes >= 8 and length > _MOST_HEADER_BYTES:
        reason = (
            f"the header would be {length} bytes long, but the format allows {_MOST_HEADER_BYTES}; "
            "this is not a safetensors file, or its start is damaged"
        )
    if reason is None:
        reason = (
            f"the file is cut inside its header: it has {file_bytes} bytes instead of at least "
            f"{length + 8}. Download it again"
        )
    return Problem(f"{path}: {reason}", (path.name,))


def _tensors(
    path: Location, header: dict[str, Any], data_start: int, file_bytes: int
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
    # The format demands that the bytes follow each other without a gap or an overlap.
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
            f"{missing} bytes are missing. The file was cut; download it again"
            if missing > 0
            else f"there are {-missing} bytes too many. The file was overwritten or appended to; "
            "download it again"
        )
        problems.append(
            Problem(f"{path}: expected {expected} bytes, found {file_bytes}; {cause}", (path.name,))
        )
    return tensors, problems


def _starts(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the offsets of the file's tensors in larger ones, in elements per axis.

    torch's HuggingFaceStorageWriter (torch/distributed/checkpoint/_hf_utils.py) writes the offsets
    of each part to the header; other files have none.
    """
    try:
        noted = parse_json(header["__metadata__"]["DCP_SHARDING_INFO"].encode())
        return {name: sizes(entry["saved_offsets"], list) for name, entry in noted.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _part(tensor: TensorInfo, start: tuple[int, ...]) -> TensorInfo:
    """Return ``tensor`` as a part of a tensor that reaches at least to the part's end."""
    piece = replace(tensor.pieces[0], start=start)
    shape = tuple(map(sum, zip(start, tensor.shape, strict=True)))
    return replace(tensor, shape=shape, pieces=(piece,), is_part=True)


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end of one header entry. Raises ``ValueError``."""
    if not isinstance(entry, dict):
        raise ValueError("its header entry is not an object")
    stored, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(stored, str) or stored not in DTYPES:
        raise ValueError(f"unknown dtype {stored!r}; quantised, or newer than this reader")
    shape, offsets = sizes(shape, list), sizes(offsets, list)
    if len(offsets) != 2:
        raise ValueError("data_offsets must be two whole numbers")
    dtype, (begin, end) = DTYPES[stored], offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(
            f"{end - begin} bytes for shape {list(shape)} of {dtype} instead of "
            f"{prod(shape) * DTYPE_BYTES[dtype]}"
        )
    return dtype, shape, begin, end
