"""Write the files that a format has planned, each by one thread of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from llamaconv.convert.destination import Destination, File
from llamaconv.convert.output import CountedBlocks
from llamaconv.ranks import Ranks
from llamaconv.report.errors import FailedError, UnusableError


def write_files(
    target: Destination, files: Sequence[File], blocks: CountedBlocks, workers: int, ranks: Ranks
) -> list[Any]:
    """Write ``files`` to ``target`` with ``workers`` threads per rank, so that they stay there.

    Args:
        target: The target to fill.
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
    n_bytes = sum(file.nbytes for file in files)
    mine = [files[place] for place in ranks.share([file.nbytes for file in files])]
    written: dict[str, tuple[int, Any]] = {}
    for part in ranks.all_gather(_write_mine(target, mine, blocks, workers, n_bytes)):
        written.update(part)
    # If a thread or a rank lost its work, do not write an index of bytes that are missing.
    if written.keys() != {file.name for file in files} or None in written.values():
        raise UnusableError(
            "internal error: the files written differ from the plan; please report this"
        )
    if ranks.first:
        target.check_there({name: length for name, (length, _) in written.items()})
    return [written[file.name][1] for file in files]


def _write_mine(
    target: Destination,
    files: Sequence[File],
    blocks: CountedBlocks,
    workers: int,
    n_bytes: int,
) -> dict[str, tuple[int, Any]]:
    """Return the length and the result of each file, by name."""
    stop = threading.Event()
    session = target.session(workers, stop, blocks, n_bytes)
    for file in files:
        _expect(file, target)
    blocks.start()
    n_helpers = session.n_helpers
    with ThreadPoolExecutor(workers) as writers, ThreadPoolExecutor(max(1, n_helpers)) as helpers:
        jobs: list[Future[Any]] = []
        try:
            jobs += [_submit(writers, session.write, file) for file in files]
            helping = [_submit(helpers, session.help, jobs) for _ in range(n_helpers)]
            wait([*jobs, *helping], return_when=FIRST_EXCEPTION)
            for job in [*jobs, *helping]:  # a writer's error before those that it caused
                if job.done():
                    job.result()
        except BaseException:
            stop.set()
            blocks.stop()
            writers.shutdown(cancel_futures=True)
            helpers.shutdown()
            session.close()
            raise
    return {file.name: job.result() for file, job in zip(files, jobs, strict=True)}


def _expect(file: File, target: Destination) -> None:
    """Announce what has to be read for a file, less what an earlier run left of it."""
    kept = target.kept_rows(file.name)
    for number, payload in enumerate(file.payloads):
        rows = kept.get(number, 0)
        payload.expect(rows if rows <= payload.n_rows else 0)


def _submit(pool: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    try:
        return pool.submit(work, *arguments)
    except RuntimeError as error:
        raise FailedError(
            f"no thread could be started ({error}). Raise the limit (ulimit -u), or choose fewer "
            "--workers"
        ) from error
