"""Build a target in a temporary folder, and rename it at the end: complete, or not at all.

The folder is called ``NAME.llamaconv-partial``. It is locked while a process fills it, so that two
conversions to one target cannot mix. The next run of the same conversion reuses what an interrupted
run left there (see `journal`); any other conversion clears it.

Limit: POSIX. On a network filesystem, a lock may hold for one host only. If the kernel cannot
exchange two names at once (other than Linux), an overwritten target does not exist for the moment
between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamaconv.convert import journal
from llamaconv.convert.target_check import check_existing, partial_of
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import FailedError, RefusedError, UnusableError
from llamaconv.report.tables import size

_TRIES = 100


@contextmanager
def staged(target: Path, overwrite: bool, fingerprint: str, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Give a folder to fill, which gets the name ``target`` after the block.

    If the block raises, an existing target is unchanged. The folder is removed, or kept if a run
    with the same fingerprint can continue from it; a note of the error says so. Of several ranks,
    rank 0 creates the folder, and renames it once every rank's block has ended.

    Args:
        target: The final name.
        overwrite: Replace a checkpoint at ``target``.
        fingerprint: That of the conversion, see `agreement.fingerprint`.
        ranks: All ranks.

    Raises:
        RefusedError: Another process fills the same target, or a rank does not see the folder.
        FailedError: The machine failed.
    """
    with _machine_failures(target), _made(target, overwrite, fingerprint, ranks) as folder:
        try:
            _check_shared(folder, ranks)
            with _machine_failures(target):
                yield folder
            ranks.all_gather(None)
        except BaseException as error:
            # Before the folder is removed: nobody writes to it any more.
            ranks.abort(error)
            raise
    ranks.broadcast()


@contextmanager
def _made(target: Path, overwrite: bool, fingerprint: str, ranks: Ranks) -> Iterator[Path]:
    partial = partial_of(target)
    if not ranks.first:
        yield partial
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(target, partial)
    try:
        # Another process may have finished between the first check of the target and the lock.
        check_existing(target, overwrite)
        with _old_locked(target):
            try:
                journal.keep(partial, fingerprint)
                yield partial
                journal.remove(partial / journal.FOLDER)
                os.fsync(lock)
                old = _put_in_place(partial, target)
            except BaseException as error:
                _end_early(partial, fingerprint, error)
                raise
            _finish(old, target)
    except RefusedError:
        with suppress(OSError):
            partial.rmdir()  # unless there is something in it
        raise
    finally:
        os.close(lock)


def _lock(target: Path, partial: Path) -> int:
    """Return a descriptor of the folder ``partial``, created if needed, locked until closed."""
    for _ in range(_TRIES):
        try:
            partial.mkdir(exist_ok=True)
            # Never clear what a link points to.
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another conversion has just ended and renamed the folder
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ELOOP, errno.ENOTDIR):
                raise RefusedError(
                    f"{partial}: a file or a link, but the unfinished target needs a folder of "
                    "this name. Move it away, or choose another target"
                ) from error
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(os.fstat(lock), os.lstat(partial)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise RefusedError(
                f"{target}: another conversion is writing to it ({partial.name}). Wait for it, or "
                "choose another target"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise RefusedError(
        f"{target}: another conversion to it has just ended. Try again if it is still needed"
    )


@contextmanager
def _old_locked(target: Path) -> Iterator[None]:
    """Lock an existing target: it is removed under the name that the next conversion fills."""
    if not target.exists():
        yield
        return
    old = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"{target}: another conversion to it has just ended. Try again if it is still needed"
            ) from None
        yield
    finally:
        os.close(old)


def _check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise the same `RefusedError` on every rank if a rank does not see rank 0's folder."""
    if ranks.size == 1:
        return
    name = f"shared-by-ranks-{uuid.uuid4().hex}"
    if ranks.first:
        (folder / name).touch()
    name = ranks.broadcast(name)
    seen = ranks.all_gather((folder / name).exists())
    if ranks.first:
        (folder / name).unlink()
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise RefusedError(
            f"{folder}: rank {blind} does not see the folder that rank 0 created. The target must "
            "be on a filesystem that every host shares, under the same path"
        )


@contextmanager
def _machine_failures(target: Path) -> Iterator[None]:
    """Turn what the machine raises while a target is written into one `FailedError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}: the disk is full. Free some space or choose another target"
        raise FailedError(
            f"{error.filename or target}: {reason}; the target was not changed"
        ) from error


def _end_early(partial: Path, fingerprint: str, error: BaseException) -> None:
    kept = journal.kept_bytes(partial, fingerprint)
    if not kept or isinstance(error, (RefusedError, UnusableError)):
        shutil.rmtree(partial, ignore_errors=True)
        return
    error.add_note(
        f"{partial} keeps {size(kept)} of it: the same command continues from there. Remove the "
        "folder if you will not run it again"
    )


def _put_in_place(partial: Path, target: Path) -> Path | None:
    """Rename ``partial`` to ``target``; return the new name of the old target, if there was one."""
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return None
    if _exchange(partial, target):
        return partial
    old = target.with_name(target.name + ".llamaconv-old")
    target.rename(old)
    partial.rename(target)
    return old


def _finish(old: Path | None, target: Path) -> None:
    """Remove ``old`` and fsync the new name, which is valid whatever happens here."""
    try:
        if old is not None:
            shutil.rmtree(old)
        _sync_folder(target.parent)
    except OSError as error:
        left = f"; the rest of the old one is in {old}" if old is not None and old.exists() else ""
        raise FailedError(
            f"{error.filename or target.parent}: {error.strerror or error}; {target} is the new "
            f"target, complete{left}"
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once with Linux's renameat2; return False if there is no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
