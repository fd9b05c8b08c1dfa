"""Ranges are fetched in the order that was announced, each once, in memory that does not grow."""

import threading
from collections.abc import Iterator

import pytest

from llamaconv import FailedError
from llamaconv.checkpoint import fetch_ahead
from llamaconv.checkpoint.fetch_ahead import FetchAhead
from llamaconv.checkpoint.remote_file import RemoteFile

CONTENT = bytes(number * 7 % 251 for number in range(5000))


class Elsewhere:
    """A file of `CONTENT`; notes what was asked for, and fails or waits where it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken_from = len(CONTENT)
        self.lock = threading.Lock()
        self.file = RemoteFile("hf://org/model@1/x", "x", "1", "", self)

    def read_into(self, name: str, first: int, out: memoryview, stop: threading.Event) -> None:
        assert name == "x"
        with self.lock:
            self.asked.append((first, first + len(out)))
        while not self.gate.wait(0.01):
            if stop.is_set():
                raise FailedError("stopped")
        if first + len(out) > self.broken_from:
            raise FailedError("cut for good")
        out[:] = CONTENT[first : first + len(out)]


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[FetchAhead]:
    monkeypatch.setattr(fetch_ahead, "RANGE_BYTES", 100)
    monkeypatch.setattr(fetch_ahead, "_REQUESTS_AT_ONCE", 3)
    monkeypatch.setattr(fetch_ahead, "_MOST_RANGES", 5)
    one = FetchAhead()
    yield one
    one.stop()


def read(ahead: FetchAhead, elsewhere: Elsewhere, first: int, last: int) -> bytes:
    out = bytearray(last - first)
    ahead.read_into(elsewhere.file, first, memoryview(out))
    return bytes(out)


def test_announced_bytes_are_read_in_any_steps_and_fetched_once(
    ahead: FetchAhead, elsewhere: Elsewhere
) -> None:
    for first in range(0, 4000, 37):
        ahead.expect(elsewhere.file, first, min(first + 37, 4000))
    ahead.start()
    found = b"".join(read(ahead, elsewhere, at, min(at + 171, 4000)) for at in range(0, 4000, 171))
    assert found == CONTENT[:4000]
    assert sorted(elsewhere.asked) == [(at, at + 100) for at in range(0, 4000, 100)]


def test_no_more_is_fetched_than_there_is_memory_for(
    ahead: FetchAhead, elsewhere: Elsewhere
) -> None:
    ahead.expect(elsewhere.file, 0, 5000)
    ahead.start()
    assert read(ahead, elsewhere, 0, 50) == CONTENT[:50]
    elsewhere.gate.wait()
    for _ in range(100):
        if len(elsewhere.asked) == 5:
            break
        threading.Event().wait(0.02)
    threading.Event().wait(0.1)
    # The first is not read to its end yet.
    assert sorted(elsewhere.asked) == [(at, at + 100) for at in range(0, 500, 100)]
    assert read(ahead, elsewhere, 50, 5000) == CONTENT[50:]


def test_what_is_skipped_makes_room(ahead: FetchAhead, elsewhere: Elsewhere) -> None:
    ahead.expect(elsewhere.file, 0, 3000)
    ahead.start()
    assert read(ahead, elsewhere, 2500, 2700) == CONTENT[2500:2700]
    assert read(ahead, elsewhere, 2700, 3000) == CONTENT[2700:3000]
    # Nobody announced these, or not any more.
    assert read(ahead, elsewhere, 100, 300) == CONTENT[100:300]
    assert read(ahead, elsewhere, 4000, 4500) == CONTENT[4000:4500]


def test_more_may_be_announced_later(ahead: FetchAhead, elsewhere: Elsewhere) -> None:
    for first in range(0, 5000, 500):
        ahead.expect(elsewhere.file, first, first + 500)
        ahead.start()
        assert read(ahead, elsewhere, first, first + 500) == CONTENT[first : first + 500]
    assert len(elsewhere.asked) == 50


def test_an_error_reaches_the_reader_where_the_bytes_are_missing(
    ahead: FetchAhead, elsewhere: Elsewhere
) -> None:
    elsewhere.broken_from = 1000
    ahead.expect(elsewhere.file, 0, 2000)
    ahead.start()
    assert read(ahead, elsewhere, 0, 1000) == CONTENT[:1000]
    with pytest.raises(FailedError, match="cut for good"):
        read(ahead, elsewhere, 1000, 1100)


def test_stop_ends_who_waits(ahead: FetchAhead, elsewhere: Elsewhere) -> None:
    elsewhere.gate.clear()
    ahead.expect(elsewhere.file, 0, 2000)
    ahead.start()
    threading.Timer(0.1, ahead.stop).start()
    with pytest.raises(FailedError, match="stopped"):
        read(ahead, elsewhere, 0, 100)
