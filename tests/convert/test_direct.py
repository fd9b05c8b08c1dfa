"""Files that are written around the page cache have the bytes of those that are not."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert import direct, disk
from llamaconv.convert.direct import DirectFile

BUFFER = 2 * direct._ALIGNED


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_BUFFER_BYTES", BUFFER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"")
    return path


class Calls:
    """What went to the file, by the flag of its descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: int = 0) -> None:
        self.direct = self.plain = 0
        self._refused = refused
        self._write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._count)

    def _count(self, descriptor: int, data: memoryview, place: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct._O_DIRECT:
            if self._refused:
                raise OSError(self._refused, os.strerror(self._refused))
            self.direct += len(data)
        else:
            self.plain += len(data)
        return self._write(descriptor, data, place)


def written(path: Path, *parts: bytes, seeks: dict[int, int] | None = None) -> DirectFile:
    with open(path, "r+b", buffering=0) as plain:
        file = DirectFile(path, plain.fileno())
        for number, part in enumerate(parts):
            if seeks and number in seeks:
                file.seek(seeks[number])
            file.write(memoryview(part))
        file.flush()
        file.close()
        return file


@pytest.mark.parametrize("length", [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 10 * BUFFER + 4097])
def test_any_length_in_any_parts(path: Path, length: int) -> None:
    chance = random.Random(length)
    data = chance.randbytes(length)
    cuts = sorted([0, length, *(chance.randint(0, length) for _ in range(9))])
    parts = [data[a:b] for a, b in pairwise(cuts)]
    file = written(path, *parts)
    assert path.read_bytes() == data
    assert file.place == file.on_file == length


def test_only_the_end_goes_through_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct._O_DIRECT:
        pytest.skip("NOTHING WAS WRITTEN DIRECTLY: this system has no O_DIRECT")
    calls = Calls(monkeypatch)
    file = written(path, bytes(5 * BUFFER + 77))
    if not file.is_direct:
        pytest.skip(f"NOTHING WAS WRITTEN DIRECTLY: the filesystem of {path} refuses")
    assert (calls.direct, calls.plain) == (5 * BUFFER, 77)


@pytest.mark.parametrize("place", [0, 5, direct._ALIGNED, BUFFER + 9, 3 * BUFFER - 1])
def test_goes_on_after_bytes_that_are_there(path: Path, place: int) -> None:
    data = random.Random(place).randbytes(5 * BUFFER + 3)
    path.write_bytes(data[: 4 * BUFFER])
    first = data[: place // 2]
    written(path, first, data[place:], seeks={1: place})
    assert path.read_bytes() == data


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_filesystem_that_refuses_at_the_first_write(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = Calls(monkeypatch, refused=number)
    data = random.Random(1).randbytes(3 * BUFFER + 5)
    file = written(path, data)
    assert path.read_bytes() == data
    assert not file.is_direct
    assert calls.direct == 0


def test_filesystem_that_refuses_to_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(name: Path, flags: int, *rest: int, **options: int) -> int:
        if flags & direct._O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(name, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    data = random.Random(2).randbytes(3 * BUFFER + 5)
    assert not written(path, data).is_direct
    assert path.read_bytes() == data


def test_system_without_direct_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS is, which has no O_DIRECT."""
    monkeypatch.setattr(direct, "_O_DIRECT", 0)
    data = random.Random(3).randbytes(3 * BUFFER + 5)
    assert not written(path, data).is_direct
    assert path.read_bytes() == data


def test_error_of_a_write_in_the_background_is_raised(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Calls(monkeypatch, refused=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        written(path, bytes(9 * BUFFER))
    with pytest.raises(OSError, match="No space left"):
        written(path, bytes(BUFFER))  # the last one: only flush can tell


@pytest.mark.parametrize(
    "target",
    [Target(shards=3), Target(to="hf", max_shard_size=150_000), Target(to="meta", shards=2)],
    ids=["dcp", "hf", "meta"],
)
def test_long_targets_have_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    plan = make_plan(open_checkpoint(checkpoints.write(tmp_path / "source")), target)
    convert_checkpoint(plan, tmp_path / "cached", verified=False)
    monkeypatch.setattr(disk, "_MOST_CACHED_BYTES", 0)
    monkeypatch.setattr(disk, "_LONG_FILE_BYTES", 0)
    begun: list[int] = []
    monkeypatch.setattr(DirectFile, "write", _counting(begun, DirectFile.write))
    convert_checkpoint(plan, tmp_path / "direct", verified=False)
    assert begun
    names = {path.name for path in (tmp_path / "cached").iterdir()}
    assert names == {path.name for path in (tmp_path / "direct").iterdir()}
    for name in names - {"llamaconv.json"}:
        assert (tmp_path / "cached" / name).read_bytes() == (
            tmp_path / "direct" / name
        ).read_bytes()


def _counting(
    begun: list[int], write: Callable[[DirectFile, memoryview], None]
) -> Callable[[DirectFile, memoryview], None]:
    def counted(self: DirectFile, data: memoryview) -> None:
        begun.append(len(data))
        write(self, data)

    return counted


def test_filesystem_that_refuses_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(open_checkpoint(checkpoints.write(tmp_path / "source")), Target(shards=3))
    monkeypatch.setattr(disk, "_MOST_CACHED_BYTES", 0)
    monkeypatch.setattr(disk, "_LONG_FILE_BYTES", 0)
    calls = Calls(monkeypatch, refused=errno.EINVAL)
    refused = convert_checkpoint(plan, tmp_path / "refused", verified=False)
    assert calls.plain > 0
    assert str(refused.table()).count("no direct writes") == 1
    monkeypatch.setattr(disk, "_MOST_CACHED_BYTES", 1 << 40)
    cached = convert_checkpoint(plan, tmp_path / "cached", verified=False)
    assert "no direct writes" not in str(cached.table())
