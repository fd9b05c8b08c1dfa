"""What ``torch.save`` wrote, read for its tensors' dtypes, shapes and places only; without torch.

It is a zip archive: ``data.pkl`` is a pickle that says which tensors there are, and each record
``data/N`` has the bytes of one storage, stored as they are. Neither is left to a general reader,
which would inflate a record to any length, or do what a pickle says (see `plain_pickle`).

Limit: the format of torch 1.6 and later, records that are not compressed, contiguous tensors.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from llamaconv.formats.plain_pickle import (
    ForeignError,
    Made,
    Named,
    Persistent,
    UnknownFormError,
    read,
)
from llamaconv.pieces import DTYPE_BYTES

# Of torch's names, what a dict of tensors consists of.
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ComplexFloatStorage": "complex64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_UNTYPED = "torch.storage.UntypedStorage"
_TENSOR, _NEW_TENSOR, _PARAMETER = (
    f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")
)
_DTYPES = {f"torch.{dtype}": dtype for dtype in DTYPE_BYTES}
_ADMITTED = frozenset(
    {_TENSOR, _NEW_TENSOR, _PARAMETER, _UNTYPED, "collections.OrderedDict", "torch.Size"}
    | _STORAGES.keys()
    | _DTYPES.keys()
)

# What torch uses for tensors of other kinds (sparse, quantised), or may use some day.
_OTHER_TENSORS = re.compile(r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w+Storage", re.ASCII)

_MOST_DIRECTORY_BYTES = 64 << 20
_MOST_PICKLE_BYTES = 100_000_000
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: torch's name of its dtype, its shape, and where in the file its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Archive:
    """The archive that begins at byte ``start`` of ``file`` and is ``length`` bytes long.

    ``value`` is what was saved, tensors in it as `Made`; `tensor` says what such a one is.

    Raises:
        UnknownFormError: It holds tensors in a form that is not read.
        ForeignError: It names anything but tensors.
        ValueError: It is damaged.
    """

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._descriptor = file.fileno()
        self._start = start
        self._length = length
        self._records = {name: (at, n_bytes) for name, at, n_bytes in self._directory()}
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, so torch.save did not write it")
        self._top = pickles[0].removesuffix("data.pkl")
        order = f"{self._top}byteorder"
        if order in self._records and (found := self._whole(order, 16)) != b"little":
            raise ValueError(f"its byteorder is {found!r}, little was expected")
        try:
            self.value = read(self._whole(pickles[0], _MOST_PICKLE_BYTES), _ADMITTED)
        except ForeignError as error:
            if not _OTHER_TENSORS.fullmatch(str(error)):
                raise
            raise UnknownFormError(
                f"a tensor in it is made by {error}, which this version of llamaconv does not know: "
                "it is not a plain tensor, or a later torch wrote it"
            ) from None

    def tensor(self, made: Any) -> Stored:
        """What a tensor of `value` is. Raises ``ValueError`` where it is none that can be read."""
        if type(made) is Made and made.name == _PARAMETER and made.args:
            made = made.args[0]
        if type(made) is not Made or made.name not in (_TENSOR, _NEW_TENSOR):
            raise ValueError(f"is a {_kind(made)}, a tensor was expected")
        try:
            storage, first, shape, strides, *rest = made.args
            word, kind, key, _, n_stored = storage.key
            dtype = _STORAGES.get(kind.name, "")
            item = DTYPE_BYTES.get(dtype, 1)
            if kind.name == _UNTYPED:
                dtype = _DTYPES[rest[2].name]
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError("is not described as torch describes a tensor") from error
        shape, strides = _sizes(shape), _sizes(strides)
        if word != "storage" or not dtype or len(strides) != len(shape):
            raise ValueError("is not described as torch describes a tensor")
        _sizes((first, n_stored))
        if not _is_contiguous(shape, strides):
            raise ValueError(
                f"its rows are not contiguous (shape {list(shape)}, strides {list(strides)}); save "
                "it again with .contiguous()"
            )
        begin, n_bytes = first * DTYPE_BYTES[dtype], prod(shape) * DTYPE_BYTES[dtype]
        at, there = self._place(f"{self._top}data/{key}")
        if begin + n_bytes > n_stored * item or n_stored * item != there:
            raise ValueError(
                f"{max(begin + n_bytes, n_stored * item)} bytes of its storage are needed, {there} "
                "are there; the file is damaged"
            )
        return Stored(dtype, shape, self._start + at + begin)

    # The directory of the archive, which stands at its end.

    def _directory(self) -> Iterator[tuple[str, int, int]]:
        """Name, place and length in bytes of each record."""
        count, n_bytes, at = self._end()
        if n_bytes > _MOST_DIRECTORY_BYTES:
            raise ValueError(f"its directory would have {n_bytes} bytes")
        directory = self._read(at, n_bytes)
        place, names, spans = 0, set(), []
        for _ in range(count):
            if place + _ENTRY.size > len(directory):
                raise ValueError("its directory is damaged")
            fields = _ENTRY.unpack_from(directory, place)
            mark, flags, method, packed, whole, n_name, n_extra, n_comment, *rest = fields
            disk, attributes, header = rest
            name_at, extra_at = place + _ENTRY.size, place + _ENTRY.size + n_name
            place = extra_at + n_extra + n_comment
            # A record that is marked as a folder would be read as empty.
            odd = disk or attributes & _IS_FOLDER
            if mark != b"PK\x01\x02" or odd or place > len(directory):
                raise ValueError("its directory is damaged")
            whole, packed, header = _long(
                (whole, packed, header), directory[extra_at : extra_at + n_extra]
            )
            name = directory[name_at:extra_at].decode("utf-8")
            if method or flags & 1 or packed != whole:
                raise ValueError(f"its record {name} is compressed; torch stores them as they are")
            if name in names:
                raise ValueError(f"its record {name} is there twice")
            names.add(name)
            begin = self._begin(header, flags, directory[name_at:extra_at])
            if begin + whole > at:
                raise ValueError(f"its record {name} is damaged")
            spans.append((header, begin + whole))
            yield name, begin, whole
        _check_apart(spans)

    def _end(self) -> tuple[int, int, int]:
        """Records, bytes and place of the directory."""
        last = self._length - _END.size
        mark, count, n_bytes, at, n_comment = _END.unpack(self._read(last, _END.size))
        if mark != b"PK\x05\x06" or n_comment:
            raise ValueError("its end is not that of an archive")
        if count == 0xFFFF or 0xFFFFFFFF in (n_bytes, at):
            mark, far = _LOCATOR.unpack(self._read(last - _LOCATOR.size, _LOCATOR.size))
            end, count, n_bytes, at = _END_64.unpack(self._read(far, _END_64.size))
            if mark != b"PK\x06\x07" or end != b"PK\x06\x06":
                raise ValueError("its end is not that of an archive")
        return count, n_bytes, at

    def _begin(self, header: int, flags: int, name: bytes) -> int:
        """Where the bytes of a record begin, after the header of its own.

        That is read by some readers in the place of the directory, so the two have to agree.
        """
        start = self._read(header, _LOCAL.size + len(name))
        mark, *said, n_name, n_extra = _LOCAL.unpack_from(start)
        same = mark == b"PK\x03\x04" and said == [flags, 0] and n_name == len(name)
        if not same or start[_LOCAL.size :] != name:
            raise ValueError(f"its record {name.decode()} is not where its directory says")
        return header + len(start) + int(n_extra)

    def _place(self, name: str) -> tuple[int, int]:
        """Where the bytes of a record begin, and how many there are."""
        if name not in self._records:
            raise ValueError("its storage is not in the file")
        return self._records[name]

    def _whole(self, name: str, most: int) -> bytes:
        at, n_bytes = self._place(name)
        if n_bytes > most:
            raise ValueError(f"its record {name} has {n_bytes} bytes, at most {most} were expected")
        return self._read(at, n_bytes)

    def _read(self, at: int, n_bytes: int) -> bytes:
        if not 0 <= at <= at + n_bytes <= self._length:
            raise ValueError("it ends early")
        content = b""
        while len(content) < n_bytes:
            left, place = n_bytes - len(content), self._start + at + len(content)
            if not (got := os.pread(self._descriptor, left, place)):
                raise ValueError("it ends early")
            content += got
        return content


# Of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7 to 4.3.16; x is passed over.
_IS_FOLDER = 0x10
_LOCAL = struct.Struct("<4s2xHH16xHH")
_ENTRY = struct.Struct("<4s4xHH8xIIHHHH2xII")
_END = struct.Struct("<4s6xHIIH")
_LOCATOR = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s28xQQQ")


def _long(values: tuple[int, ...], extra: bytes) -> list[int]:
    """The values, with those that need more than 32 bits from the extra field that has them."""
    at = 0
    longer: list[int] = []
    while at + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + n_bytes]
            longer = [n for (n,) in struct.iter_unpack("<Q", field[: n_bytes // 8 * 8])]
        at += 4 + n_bytes
    found = iter(longer)
    try:
        return [next(found) if value == 0xFFFFFFFF else value for value in values]
    except (StopIteration, RuntimeError) as error:
        raise ValueError("its directory is damaged") from error


def _check_apart(spans: list[tuple[int, int]]) -> None:
    """Raises ``ValueError`` where the bytes of two records are the same."""
    end = 0
    for first, last in sorted(spans):
        if first < end:
            raise ValueError("its records lie over one another")
        end = last


def _sizes(value: Any) -> tuple[int, ...]:
    """``value`` as numbers that are none below 0. Raises ``ValueError``."""
    if type(value) is Made and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple or len(value) > _MOST_DIMENSIONS:
        raise ValueError("is not described as torch describes a tensor")
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("its shape, strides or offset are not whole numbers of 0 and more")
    return value


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return 0 in shape
        step *= n
    return True


def _kind(value: Any) -> str:
    if isinstance(value, Made | Named):
        return value.name
    return "storage" if isinstance(value, Persistent) else type(value).__name__
