"""How bytes reach a writer, and how files are dealt out: what the engine and every format share.

A format plans its files, and `write_files` has them written: each by one thread of one rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llamaconv.formats.output import Output, Payload
from llamaconv.formats.settle import Settler
from llamaconv.problems import FailedError, UnusableError, some
from llamaconv.ranks import Ranks


class Blocks(Protocol):
    """The target's bytes, and what becomes of them."""

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """Rows ``first`` to ``last`` (excluded) of tensor ``name``, in order.

        A block is valid until the next is asked for: its buffer is used again.
        """

    def sound(self, name: str) -> bool:
        """Whether every row of ``name`` that was asked for so far is as it should be."""

    def count(self, n_written: int, n_reused: int = 0) -> None:
        """So many bytes of tensors are written; so many stood in their file already."""


def rows_payload(blocks: Blocks, name: str, first: int, last: int, row_bytes: int) -> Payload:
    """Rows ``first`` to ``last`` (excluded) of tensor ``name``, whole rows, as they stand in a file."""
    return Payload(
        last - first,
        row_bytes,
        lambda row: blocks.blocks(name, first + row, last),
        partial(blocks.sound, name),
    )


@dataclass(frozen=True)
class File:
    """One file of the target: its name, the bytes of its tensors, and what writes it.

    One thread writes it (Linux lets in one write to a file at a time, so two would take turns).
    ``write`` returns what JSON can carry.
    """

    name: str
    nbytes: int
    write: Callable[[Output], Any]


def write_files(
    folder: Path, files: Sequence[File], blocks: Blocks, workers: int, ranks: Ranks
) -> list[Any]:
    """Has ``files`` written to ``folder``, by ``workers`` threads of each rank, and on the disk.

    Every rank writes its share, and gets what ``write`` returned for each file of all. Raises
    the first error of a thread, once the others have stopped, and `FailedError` where a file is
    not there as it was written.
    """
    mine = [files[place] for place in ranks.share([file.nbytes for file in files])]
    written: dict[str, tuple[int, Any]] = {}
    for part in ranks.all_gather(_write_mine(folder, mine, blocks, workers)):
        written.update(part)
    # A thread or a rank that lost its work must not end in an index over bytes that are not there.
    if written.keys() != {file.name for file in files}:
        raise UnusableError("what was written is not what was planned; this is a bug")
    if ranks.first:
        _check_there(folder, {name: length for name, (length, _) in written.items()})
    return [written[file.name][1] for file in files]


def _write_mine(
    folder: Path, files: Sequence[File], blocks: Blocks, workers: int
) -> dict[str, tuple[int, Any]]:
    """Length and result by name."""
    stop = threading.Event()
    settler = Settler(workers + 1, stop)

    def write(file: File) -> Any:
        settler.wait_for_room()
        with Output(folder, file.name, stop, blocks.count) as output:
            unsettled = settler.begin(output)
            written = file.write(output)
        settler.end(unsettled)
        return written

    n_settlers = (workers + 1) // 2
    with ThreadPoolExecutor(workers) as writers, ThreadPoolExecutor(n_settlers) as settlers:
        jobs: list[Future[Any]] = []
        try:
            jobs += [_submit(writers, write, file) for file in files]
            settling = [_submit(settlers, settler.work, jobs) for _ in range(n_settlers)]
            wait([*jobs, *settling], return_when=FIRST_EXCEPTION)
            for job in [*jobs, *settling]:  # a writer's own error before what came of it
                if job.done():
                    job.result()
        except BaseException:
            stop.set()
            writers.shutdown(cancel_futures=True)
            settlers.shutdown()
            settler.close()
            raise
    return {
        file.name: ((folder / file.name).stat().st_size, job.result())
        for file, job in zip(files, jobs, strict=True)
    }


def _submit(pool: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    try:
        return pool.submit(work, *arguments)
    except RuntimeError as error:
        raise FailedError(
            f"no thread could be started ({error}); let this user have more (ulimit -u), or give a "
            "smaller --workers"
        ) from error


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
