"""How bytes reach a writer, and how files are dealt out: what the engine and every format share.

A format plans its files, and `write_files` has them written: each by one thread of one rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llamaconv.problems import FailedError, some
from llamaconv.ranks import Ranks

Blocks = Callable[[str, int, int], Iterator[memoryview]]
"""(tensor, first row, last row excluded) to the target's bytes of those rows, in order.

A block is valid until the next is asked for: its buffer is used again.
"""


def write_all(file: BinaryIO, view: memoryview) -> None:
    """All of ``view``, however little an unbuffered file takes at a time."""
    while len(view):
        view = view[file.write(view) :]


@dataclass(frozen=True)
class File:
    """One file of the target: its name, the bytes of its tensors, and what writes it.

    ``write`` gets the path, and an event that says to stop; it returns what JSON can carry.
    """

    name: str
    nbytes: int
    write: Callable[[Path, threading.Event], Any]


def write_files(folder: Path, files: Sequence[File], workers: int, ranks: Ranks) -> list[Any]:
    """Has ``files`` written to ``folder``, by ``workers`` threads of each rank.

    Every rank writes its share, and gets what ``write`` returned for each file of all. Raises
    the first error of a thread, once the others have stopped, and `FailedError` where a file is
    not there as it was written.
    """
    mine = [files[place] for place in ranks.share([file.nbytes for file in files])]
    written: dict[str, tuple[int, Any]] = {}
    for part in ranks.together(_write_mine(folder, mine, workers)):
        written.update(part)
    # A thread or a rank that lost its work must not end in an index over bytes that are not there.
    if written.keys() != {file.name for file in files}:
        raise FailedError("what was written is not what was planned; this is a bug")
    if ranks.first:
        _check_there(folder, {name: length for name, (length, _) in written.items()})
    return [written[file.name][1] for file in files]


def _write_mine(folder: Path, files: Sequence[File], workers: int) -> dict[str, tuple[int, Any]]:
    """Length and result by name."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(file.write, folder / file.name, stop) for file in files]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {
        file.name: ((folder / file.name).stat().st_size, job.result())
        for file, job in zip(files, jobs, strict=True)
    }


def _check_there(folder: Path, lengths: dict[str, int]) -> None:
    """Opens every file: a network's filesystem shows what another host wrote once it is opened."""
    wrong = []
    for name, length in lengths.items():
        try:
            with open(folder / name, "rb") as file:
                found = file.seek(0, 2)
        except FileNotFoundError:
            found = -1
        if found != length:
            wrong.append(f"{name} ({length:,} bytes written, {max(found, 0):,} seen)")
    if wrong:
        raise FailedError(
            f"{folder}: rank 0 does not see {some(wrong, 3)}; the target must lie on a filesystem "
            "that every host shares"
        )
