"""The archive that ``torch.save`` writes: where each record's bytes lie, by its own directory.

torch computes the places of tensors without looking at their records, and reads whole files by
the records; only where both agree are the bytes that are read here those that others get. Format:
a zip of stored (uncompressed) records, all in one folder.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import IO, BinaryIO, cast

_LOCAL_HEADER = 30
# What a damaged directory leads zipfile to.
_DAMAGED = (
    *(zipfile.BadZipFile, OSError, NotImplementedError, OverflowError),
    *(UnicodeDecodeError, struct.error),
)


def records(
    file: BinaryIO, begin: int = 0, length: int | None = None
) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of each record, by its name inside the one folder.

    The archive is ``length`` bytes of ``file`` from ``begin`` on, and offsets count from there.
    Raises ``ValueError`` where it is not as torch writes it.
    """
    end = os.fstat(file.fileno()).st_size if length is None else begin + length
    part = cast(IO[bytes], io.BufferedReader(_Part(file, begin, end), 1024))
    try:
        with zipfile.ZipFile(part) as archive:
            return _records(part, archive)
    except _DAMAGED as error:
        raise ValueError(f"its archive is damaged: {error}") from error


def _records(file: IO[bytes], archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if info.compress_type or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"the archive's record {name} is compressed; torch stores them")
        if info.external_attr & 0x10 or info.is_dir():
            # torch takes it for empty, and gives whatever was in memory for its bytes.
            raise ValueError(f"the archive's record {name} is marked as a folder")
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        if header[:4] != b"PK\x03\x04" or file.read(name_bytes) != info.orig_filename.encode():
            raise ValueError(f"the archive's record {name} is not where its directory says")
        if name in found:
            raise ValueError(f"the archive has the record {name} twice")
        begin = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        found[name] = begin, info.file_size
        if name == "byteorder":
            file.seek(begin)
            if (order := file.read(min(info.file_size, 16))) != b"little":
                raise ValueError(f"its bytes are {order!r} endian; little was expected")
    return found


class _Part(io.RawIOBase):
    """Bytes ``begin`` to ``end`` of a file, as a file; its own place stays where it is."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self._descriptor = file.fileno()
        self._begin, self._end = begin, end
        self._at = begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (self._begin, self._at, self._end)[whence]
        if start + offset < self._begin:
            raise OSError("a seek to before the beginning")
        self._at = start + offset
        return self._at - self._begin

    def readinto(self, out: bytearray) -> int:  # type: ignore[override]
        most = max(0, min(len(out), self._end - self._at))
        got = os.preadv(self._descriptor, [memoryview(out)[:most]], self._at) if most else 0
        self._at += got
        return got
