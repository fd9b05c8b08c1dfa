"""Write the files that a format has planned, each by one thread of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaconv.convert.journal import Journal
from llamaconv.convert.output import CountedBlocks, Output, Payload
from llamaconv.convert.sync import BackgroundSync
from llamaconv.ranks import Ranks
from llamaconv.report.errors import FailedError, UnusableError, first_few

# A target of up to so many bytes stays in the page cache: who made it loads it next.
_MOST_CACHED_BYTES = 4 << 30
_LONG_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class File:
    """One file of the target. One thread writes it: Linux does one write to a file at a time.

    Attributes:
        name: Its name in the folder.
        payloads: The rows that it holds, in order.
        write: Writes it, and returns a JSON value.
    """

    name: str
    payloads: Sequence[Payload]
    write: Callable[[Output], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.n_rows * one.bytes_per_row for one in self.payloads)

    def expect(self, folder: Path) -> None:
        """Announce what has to be read for this file, less what an earlier run left of it."""
        kept = Journal(folder, self.name).read()
        for number, payload in enumerate(self.payloads):
            rows = kept[number].rows if number in kept else 0
            payload.expect(rows if rows <= payload.n_rows else 0)


def write_files(
    folder: Path, files: Sequence[File], blocks: CountedBlocks, workers: int, ranks: Ranks
) -> list[Any]:
    """Write ``files`` to ``folder`` with ``workers`` threads per rank, and fsync them.

    Args:
        folder: The folder to fill.
        files: All files of the target; every rank writes its share.
        blocks: Counts the bytes.
        workers: Writer threads of this rank.
        ranks: The processes that share the work.

    Returns:
        What ``write`` returned for each file, of all ranks.

    Raises:
        FailedError: A file is not as it was written; and what a thread raised first, once all
            others have stopped.
    """
    # What the page cache cannot keep for its next reader is written around it.
    direct = sum(file.nbytes for file in files) > _MOST_CACHED_BYTES
    mine = [files[place] for place in ranks.share([file.nbytes for file in files])]
    written: dict[str, tuple[int, Any]] = {}
    for part in ranks.all_gather(_write_mine(folder, mine, blocks, workers, direct)):
        written.update(part)
    # If a thread or a rank lost its work, do not write an index of bytes that are missing.
    if written.keys() != {file.name for file in files}:
        raise UnusableError(
            "internal error: the files written differ from the plan; please report this"
        )
    if ranks.first:
        _check_there(folder, {name: length for name, (length, _) in written.items()})
    return [written[file.name][1] for file in files]


def _write_mine(
    folder: Path, files: Sequence[File], blocks: CountedBlocks, workers: int, direct: bool
) -> dict[str, tuple[int, Any]]:
    """Return the length and the result of each file, by name."""
    stop = threading.Event()
    sync = BackgroundSync(workers + 1, stop)

    def write(file: File) -> Any:
        sync.wait_for_room()
        is_long = direct and file.nbytes >= _LONG_FILE_BYTES
        with Output(folder, file.name, stop, blocks.count, is_long) as output:
            open_file = sync.begin(output)
            written = file.write(output)
        if output.was_refused:
            blocks.note_refusal()
        sync.end(open_file)
        return written

    for file in files:
        file.expect(folder)
    blocks.start()
    n_syncers = (workers + 1) // 2
    with ThreadPoolExecutor(workers) as writers, ThreadPoolExecutor(n_syncers) as syncers:
        jobs: list[Future[Any]] = []
        try:
            jobs += [_submit(writers, write, file) for file in files]
            syncing = [_submit(syncers, sync.work, jobs) for _ in range(n_syncers)]
            wait([*jobs, *syncing], return_when=FIRST_EXCEPTION)
            for job in [*jobs, *syncing]:  # a writer's error before those that it caused
                if job.done():
                    job.result()
        except BaseException:
            stop.set()
            blocks.stop()
            writers.shutdown(cancel_futures=True)
            syncers.shutdown()
            sync.close()
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
            f"no thread could be started ({error}). Raise the limit (ulimit -u), or choose fewer "
            "--workers"
        ) from error


def _check_there(folder: Path, lengths: dict[str, int]) -> None:
    """Open every file: a network filesystem shows what another host wrote once it is opened."""
    wrong = []
    for name, length in lengths.items():
        try:
            with (folder / name).open("rb") as file:
                found = file.seek(0, 2)
        except FileNotFoundError:
            found = -1
        if found != length:
            wrong.append(f"{name} ({length:,} bytes written, {max(found, 0):,} seen)")
    if wrong:
        raise FailedError(
            f"{folder}: rank 0 does not see {first_few(wrong, 3)}; the target must be on a filesystem "
            "that every host shares"
        )
