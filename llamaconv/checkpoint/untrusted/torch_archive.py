"""What ``torch.save`` writes, read for its tensors' dtypes, shapes and offsets only; without torch.

It is a zip archive: ``data.pkl`` is a pickle that says which tensors there are, and each record
``data/N`` has the bytes of one storage, stored as they are. Neither is left to a general reader,
which would inflate a record to any length, or do what a pickle says (see `pickle_data`).

Next to the weights a trainer saves its options and counters: Namespace, numpy's scalars, classes of
its own. These are read past (`_INERT`, `_CLASSES`); a call that such values do not need is refused.

Limit: the format of torch 1.6 and later, records that are not compressed, tensors of strides that
are not zero.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from llamaconv.checkpoint.tensors import DTYPE_BYTES
from llamaconv.checkpoint.untrusted.files import ByteSource
from llamaconv.checkpoint.untrusted.pickle_data import (
    ForbiddenNameError,
    PersistentId,
    PickledCall,
    PickledName,
    UnknownFormError,
    read,
)
from llamaconv.checkpoint.untrusted.values import sizes

# The names in torch that a dict of tensors consists of.
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
_TENSOR, _NEW_TENSOR, _PARAMETER, _PARAMETER_WITH_STATE = (
    f"torch._utils._rebuild_{what}"
    for what in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
# A tensor or parameter with attributes: the builder, its class, the builder's arguments, the state.
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_DTYPES = {f"torch.{dtype}": dtype for dtype in DTYPE_BYTES}
_ADMITTED = frozenset(
    {_TENSOR, _NEW_TENSOR, _PARAMETER, _PARAMETER_WITH_STATE, _OF_TYPE, *_TYPES}
    | {_UNTYPED, "collections.OrderedDict", "torch.Size", "torch.device"}
    | _STORAGES.keys()
    | _DTYPES.keys()
)

# What Python and numpy call for plain values next to weights; the arguments do not matter.
_INERT = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "collections.defaultdict",
        "collections.Counter",
        "collections.deque",
        "_codecs.encode",
        "_io.BytesIO",  # TransformerEngine's _extra_state
        "uuid.UUID",
        "decimal.Decimal",
        *(f"{copy}._reconstructor" for copy in ("copyreg", "copy_reg")),
        *(f"{core}.multiarray.{what}" for core in ("numpy.core", "numpy._core")
          for what in ("scalar", "_reconstruct")),
        *(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core")),
        *(f"numpy.{what}" for what in ("dtype", "ndarray")),
        *(f"datetime.{what}" for what in ("date", "datetime", "timedelta", "time", "timezone")),
        *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local")
          for kind in ("Posix", "PurePosix", "Windows", "PureWindows")),
        *(f"{module}.{what}" for module in ("builtins", "__builtin__")
          for what in ("object", "set", "frozenset", "complex", "slice", "range", "xrange",
                       "list", "dict", "int", "float", "str", "bool", "bytes")),
    }
)  # fmt: skip
# Classes of other people's packages, created as `pickle_data` allows: options and configurations.
_OURS = "|".join(map(re.escape, sorted({*sys.stdlib_module_names, "__builtin__", "torch"})))
_CLASSES = re.compile(rf"(?!(?:{_OURS})\.)[A-Za-z_]\w*(?:\.\w+)+", re.ASCII)

# What torch uses for other kinds of tensors (sparse, quantised), or may use in the future.
_OTHER_TENSORS = re.compile(r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w+Storage", re.ASCII)

# Of those, and of torch's classes, what stands for tensors that are cut over ranks.
_PARTS = re.compile(r"torch\._utils\._rebuild_wrapper_subclass|torch\.distributed\..+", re.ASCII)
_PARTED = re.compile(rb"\b(?:DTensor|ShardedTensor)\b")

# A DTensor: what builds it, its class, and what describes its mesh, which nobody needs here. A file of
# one rank holds the rank's own part, a plain tensor among its attributes.
_WRAPPED, _LOCAL_TENSOR = "torch._utils._rebuild_wrapper_subclass", "_local_tensor"
_DTENSORS = ("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor")
_OF_A_MESH = re.compile(
    r"torch\.distributed\.(?:tensor|device_mesh|_mesh_layout)(?:\.\w+)+"
    r"|torch\.serialization\._get_layout",
    re.ASCII,
)

_MOST_DIRECTORY_BYTES = 64 << 20
_MOST_PICKLE_BYTES = 100_000_000
# Elements from the first to the last of a row, or of a column, that one read may span.
_MOST_RUN = 4 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in the file.

    Attributes:
        dtype: Torch's name of its dtype.
        shape: Its extent, in elements per axis.
        offset: Its first byte in the file.
        strides: The distance of its rows and columns, in elements; () if they follow each other.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] = ()


class _InertOfRanks:
    """The names of `_INERT`, and those that describe the mesh of a DTensor."""

    def __contains__(self, name: object) -> bool:
        return name in _INERT or (type(name) is str and _OF_A_MESH.fullmatch(name) is not None)


class Archive:
    """The archive that begins at byte ``start`` of ``source`` and is ``length`` bytes long.

    ``value`` is what was saved, with a `PickledCall` for each tensor, which `tensor` reads. With
    ``of_rank``, a DTensor is read as the rank's own part of it; without, it is refused.

    Raises:
        UnknownFormError: It holds tensors in a form that cannot be read.
        ForbiddenNameError: It names anything but tensors.
        ValueError: It is damaged.
    """

    def __init__(self, source: ByteSource, start: int, length: int, of_rank: bool = False) -> None:
        self._source = source
        self._start = start
        self._length = length
        self._records = {name: (at, n_bytes) for name, at, n_bytes in self._directory()}
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl, so torch.save did not write it")
        self._top = pickles[0].removesuffix("data.pkl")
        order = f"{self._top}byteorder"
        if order in self._records and (found := self._whole(order, 16)) != b"little":
            raise ValueError(f"its byteorder is {found!r} instead of little")
        try:
            content = self._whole(pickles[0], _MOST_PICKLE_BYTES)
            admitted = _ADMITTED | {_WRAPPED, *_DTENSORS} if of_rank else _ADMITTED
            inert = _InertOfRanks() if of_rank else _INERT
            self.value = read(content, admitted, later=_CLASSES, inert=inert)
        except ForbiddenNameError as error:
            if _PARTS.fullmatch(str(error)) and (kind := _PARTED.search(content)):
                raise UnknownFormError(
                    f"its tensors are {kind[0].decode()}s, of which each rank saves its own part. "
                    "Gather the whole before torch.save, with get_model_state_dict and "
                    "StateDictOptions(full_state_dict=True), or save with "
                    "torch.distributed.checkpoint"
                ) from None
            if not _OTHER_TENSORS.fullmatch(str(error)):
                raise
            raise UnknownFormError(
                f"a tensor in it is created by {error}, which this version of llamaconv does not "
                "know: it is not a plain tensor, or a later torch wrote it"
            ) from None

    def tensor(self, made: Any, views: bool = False) -> Stored:
        """Return what a tensor of `value` is.

        Args:
            made: A value of `value`, or what it contains.
            views: Whether the rows may be apart, or stored column by column.

        Raises:
            ValueError: It cannot be read.
        """
        made = _built(made)
        if not is_tensor(made):
            raise ValueError(f"expected a tensor, found {kind_of(made)}")
        try:
            storage, first, shape, strides, *rest = made.args
            word, kind, key, _, n_stored = storage.key
            dtype = _STORAGES.get(kind.name, "")
            item = DTYPE_BYTES.get(dtype, 1)
            if kind.name == _UNTYPED:
                dtype = _DTYPES[rest[2].name]
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError("not described as torch describes a tensor") from error
        shape, strides = sizes(shape), sizes(strides)
        if word != "storage" or not dtype or len(strides) != len(shape):
            raise ValueError("not described as torch describes a tensor")
        sizes((first, n_stored))
        reach = prod(shape)
        if _is_contiguous(shape, strides):
            strides = ()
        elif views and _is_readable(shape, strides):
            reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        else:
            raise ValueError(
                f"its rows are not contiguous (shape {list(shape)}, strides {list(strides)}); save "
                "it again with .contiguous()"
            )
        begin, n_bytes = first * DTYPE_BYTES[dtype], reach * DTYPE_BYTES[dtype]
        at, there = self._place(f"{self._top}data/{key}")
        if begin + n_bytes > n_stored * item or n_stored * item != there:
            raise ValueError(
                f"{max(begin + n_bytes, n_stored * item)} bytes of its storage are needed, but it "
                f"has {there}; the file is damaged"
            )
        return Stored(dtype, shape, self._start + at + begin, strides)

    # The directory, which is at the end of the archive.

    def _directory(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, offset and length in bytes of each record."""
        count, n_bytes, at = self._end()
        if n_bytes > _MOST_DIRECTORY_BYTES:
            raise ValueError(f"its directory would have {n_bytes} bytes")
        directory = self._read(at, n_bytes)
        place, names, spans = 0, set(), []
        records = []
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
                raise ValueError(
                    f"its record {name} is compressed; torch stores records as they are"
                )
            if name in names:
                raise ValueError(f"its record {name} appears twice")
            names.add(name)
            records.append((name, header, flags, directory[name_at:extra_at], whole))
        # Each record's own header is elsewhere in the file.
        self._source.expect(
            (self._start + header, self._start + header + _LOCAL.size + len(stored))
            for _, header, _, stored, _ in records
        )
        for name, header, flags, stored, whole in records:
            begin = self._begin(header, flags, stored)
            if begin + whole > at:
                raise ValueError(f"its record {name} is damaged")
            spans.append((header, begin + whole))
            yield name, begin, whole
        _check_apart(spans)

    def _end(self) -> tuple[int, int, int]:
        """Return the number of records, and length and offset of the directory."""
        last = self._length - _END.size
        mark, count, n_bytes, at, n_comment = _END.unpack(self._read(last, _END.size))
        if mark != b"PK\x05\x06" or n_comment:
            raise ValueError("it does not end as an archive does")
        if count == 0xFFFF or 0xFFFFFFFF in (n_bytes, at):
            mark, far = _LOCATOR.unpack(self._read(last - _LOCATOR.size, _LOCATOR.size))
            end, count, n_bytes, at = _END_64.unpack(self._read(far, _END_64.size))
            if mark != b"PK\x06\x07" or end != b"PK\x06\x06":
                raise ValueError("it does not end as an archive does")
        return count, n_bytes, at

    def _begin(self, header: int, flags: int, name: bytes) -> int:
        """Return the offset of a record's bytes, after its own header.

        Some readers use that header instead of the directory, so the two must agree.
        """
        start = self._read(header, _LOCAL.size + len(name))
        mark, *said, n_name, n_extra = _LOCAL.unpack_from(start)
        same = mark == b"PK\x03\x04" and said == [flags, 0] and n_name == len(name)
        if not same or start[_LOCAL.size :] != name:
            raise ValueError(f"its record {name.decode()} is not where its directory says")
        return header + len(start) + int(n_extra)

    def _place(self, name: str) -> tuple[int, int]:
        """Return the offset of a record's bytes, and how many it has."""
        if name not in self._records:
            raise ValueError("its storage is not in the file")
        return self._records[name]

    def _whole(self, name: str, most: int) -> bytes:
        at, n_bytes = self._place(name)
        if n_bytes > most:
            raise ValueError(f"its record {name} has {n_bytes} bytes, more than {most}")
        return self._read(at, n_bytes)

    def _read(self, at: int, n_bytes: int) -> bytes:
        if not 0 <= at <= at + n_bytes <= self._length:
            raise ValueError("it ends early")
        content = self._source.read(self._start + at, n_bytes)
        if len(content) < n_bytes:
            raise ValueError("it ends early")
        return content


# Of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7 to 4.3.16; x is skipped.
_IS_FOLDER = 0x10
_LOCAL = struct.Struct("<4s2xHH16xHH")
_ENTRY = struct.Struct("<4s4xHH8xIIHHHH2xII")
_END = struct.Struct("<4s6xHIIH")
_LOCATOR = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s28xQQQ")


def _long(values: tuple[int, ...], extra: bytes) -> list[int]:
    """Return the values; those that need more than 32 bits are in the extra field."""
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
    """Raise ``ValueError`` if two records share bytes."""
    end = 0
    for first, last in sorted(spans):
        if first < end:
            raise ValueError("its records overlap")
        end = last


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return 0 in shape
        step *= n
    return True


def _is_readable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether a view has an element of the storage for each of its own, in short runs.

    An expanded tensor has fewer, and could claim any size.
    """
    if not 1 <= len(shape) <= 2 or not all(strides) or 0 in shape:
        return False
    (n, step), *outer = sorted(zip(shape, strides, strict=True), key=lambda axis: axis[1])
    return all(stride >= (n - 1) * step + 1 for _, stride in outer) and n * step <= _MOST_RUN


def _built(made: Any) -> Any:
    """Return the call that builds a tensor, without what turns it into a parameter."""
    for _ in range(4):
        if type(made) is not PickledCall or not made.args:
            return made
        if made.name in (_PARAMETER, _PARAMETER_WITH_STATE):
            made = made.args[0]
        elif made.name == _OF_TYPE and len(made.args) == 4:
            builder, kind, args, _ = made.args
            if type(builder) is not PickledName or type(args) is not tuple:
                raise ValueError("not described as torch describes a tensor")
            if builder.name == _WRAPPED:
                made = _part_of_rank(kind, made.args[3])
                continue
            if type(kind) is not PickledName or kind.name not in _TYPES:
                raise ValueError(
                    f"a tensor of the class {kind_of(kind)} asks for {_OF_TYPE}; save it as a "
                    "plain tensor"
                )
            made = PickledCall(builder.name, args)
    return made


def _part_of_rank(kind: Any, attributes: Any) -> Any:
    """Return the rank's part of a DTensor."""
    if type(kind) is not PickledName or kind.name not in _DTENSORS:
        raise ValueError(f"a tensor of the class {kind_of(kind)}; save it as a plain tensor")
    # Attributes in slots come second, after those in a dict.
    for found in attributes if type(attributes) is tuple else (attributes,):
        if type(found) is dict and is_tensor(found.get(_LOCAL_TENSOR)):
            return found[_LOCAL_TENSOR]
    raise ValueError("a DTensor without the part of its rank")


def is_tensor(value: Any) -> bool:
    """Return whether ``value`` is a call that builds a tensor, a parameter, or a subclass."""
    return type(value) is PickledCall and value.name in (
        _TENSOR,
        _NEW_TENSOR,
        _PARAMETER,
        _PARAMETER_WITH_STATE,
        _OF_TYPE,
    )


def kind_of(value: Any) -> str:
    """Return what ``value`` is, for a message."""
    if isinstance(value, PickledCall | PickledName):
        return value.name
    return "storage" if isinstance(value, PersistentId) else type(value).__name__
