"""Runs a command and says what it took: seconds, memory, bytes read and written.

Children count: their memory is summed up at each look, their bytes are exact, since the system
adds those of a process that has ended to its parent's. A command that would take the machine's
last memory is stopped before the system has to choose a victim, and the measurement says so.

The limit: Linux; memory between two looks is not seen but for the high-water mark of one process.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.01
_RESERVE = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """What a command took. Memory in bytes: resident, of which anonymous, of which pages of files.

    Each is the peak of its own, so the last two may add up to more than the first.

    ``asked`` and ``handed`` are the bytes of its read and write calls, ``read`` and ``written``
    those that went to the disk. ``failure`` is empty, or why it did not end well, in words.
    """

    seconds: float
    resident: int
    anonymous: int
    mapped: int
    asked: int
    handed: int
    read: int
    written: int
    output: str
    failure: str


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    sync: Path | None = None,
) -> Measurement:
    """Runs ``command`` to its end; the fsync of what is in ``sync`` is part of its time."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        before = _bytes(Path("/proc/self/io"))
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command], stdout=out, stderr=error, env=environment, start_new_session=True
        )
        try:
            *peaks, failure = _watch(process)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if sync is not None and not process.returncode:
            fsync(sync)
        seconds = time.perf_counter() - began
        after = _bytes(Path("/proc/self/io"))
        for file in (out, error):
            file.seek(0)
        if process.returncode and not failure:
            failure = _why(process.returncode, error.read())
        counts = [after[name] - before[name] for name in before]
        return Measurement(seconds, *peaks, *counts, out.read(), failure)


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, int, int, str]:
    """Peaks of ``process`` and its children (resident, anonymous, of files), once it has ended."""
    resident = anonymous = mapped = 0
    failure = ""
    while process.poll() is None:
        looks = [_status(pid) for pid in _tree(process.pid)]
        resident = max(resident, *(one["VmHWM"] for one in looks), _sum(looks, "VmRSS"))
        anonymous = max(anonymous, _sum(looks, "RssAnon"))
        mapped = max(mapped, _sum(looks, "RssFile"))
        available = _status_file(Path("/proc/meminfo"))["MemAvailable"]
        if available < _RESERVE and not failure:
            os.killpg(process.pid, signal.SIGKILL)
            failure = f"stopped at {anonymous / 1e9:.1f} GB of memory, the machine had no more"
        time.sleep(_LOOK_SECONDS)
    return resident, anonymous, mapped, failure


def _sum(looks: list[dict[str, int]], name: str) -> int:
    return sum(look[name] for look in looks)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return  # it has ended meanwhile
    for child in children:
        yield from _tree(int(child))


def _status(pid: int) -> dict[str, int]:
    # A process that has ended has no memory, and none of these lines.
    try:
        found = _status_file(Path(f"/proc/{pid}/status"))
    except OSError:
        found = {}
    return {name: found.get(name, 0) for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def _status_file(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def _bytes(path: Path) -> dict[str, int]:
    lines = dict(line.split(": ") for line in path.read_text().splitlines())
    return {name: int(lines[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes")}


def _why(status: int, error: str) -> str:
    if status == -signal.SIGKILL:
        return "killed by the system, as it does when memory runs out"
    last = error.strip().splitlines()[-1:] or ["it said nothing"]
    return f"exit status {status}: {last[0][:300]}"


def copy(source: Path, target: Path) -> float:
    """Seconds of ``cp`` and an fsync a file, the yardstick of every ratio."""
    began = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        subprocess.run(["cp", file, target / file.name], check=True)
        fsync(target / file.name)
    return time.perf_counter() - began


def direct(folder: Path, n_bytes: int) -> float:
    """Seconds that the disk alone takes for so many bytes, the best of 1, 2 and 4 writers.

    Blocks of 16 MiB around the page cache and an fsync a file, what no program can be faster than.
    """
    return min(_direct(folder, n_bytes, writers) for writers in (1, 2, 4))


def _direct(folder: Path, n_bytes: int, writers: int) -> float:
    block = mmap.mmap(-1, 16 << 20)
    block.write(os.urandom(len(block)))
    blocks = max(1, round(n_bytes / len(block) / writers))
    paths = [folder / f"direct-{number}" for number in range(writers)]

    def write(path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        for number in range(blocks):
            os.pwrite(descriptor, block, number * len(block))
        os.fsync(descriptor)
        os.close(descriptor)

    began = time.perf_counter()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, paths))
    seconds = time.perf_counter() - began
    for path in paths:
        path.unlink()
    return seconds * n_bytes / (blocks * len(block) * writers)


def fsync(path: Path) -> None:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def cache(files: Path, *, warm: bool) -> None:
    """Brings what is in ``files`` into the page cache, or puts it out (no root needed)."""
    os.sync()
    for file in sorted(files.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        if warm:
            while os.read(descriptor, 16 << 20):
                pass
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def machine() -> dict[str, object]:
    """Cores, bytes of memory, kernel."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": _status_file(Path("/proc/meminfo"))["MemTotal"],
        "system": " ".join(os.uname()[i] for i in (0, 2, 4)),
    }
