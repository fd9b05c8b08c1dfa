"""A target folder that is complete or not there: built beside its place, renamed last.

The sibling is called ``NAME.llamaconv-partial``. It is locked while a process fills it, so
that two conversions to one target cannot mix. What a run that ended early left there is of use to
the next run of the same conversion (see `journal`); any other clears it.

Limit: POSIX. A lock on a network's filesystem may hold for one host only. Where the kernel cannot
exchange two names at once (other than Linux), an overwritten target is away for the moment
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

from llamaconv import journal
from llamaconv.problems import FailedError, RefusedError, UnusableError
from llamaconv.ranks import ALONE, Ranks
from llamaconv.tables import size
from llamaconv.target_check import check_existing, partial_of

_TRIES = 100


@contextmanager
def staged(target: Path, overwrite: bool, fingerprint: str, ranks: Ranks = ALONE) -> Iterator[Path]:
    """A folder to fill; it takes the name ``target`` when the block ends, and not before.

    When the block raises, whatever stood at ``target`` stands as it was. The folder is removed,
    or kept where a run of the same ``fingerprint`` can go on from it; a note of the error says so.
    Of several ranks, rank 0 makes it, and puts it in place once every rank's block has ended.
    Raises `RefusedError` where another process fills the same target, or where a rank does not
    see the folder; what the machine raises leaves as `FailedError`.
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
        _check_again(target, overwrite, partial)
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
    finally:
        os.close(lock)


def _lock(target: Path, partial: Path) -> int:
    """A descriptor of the folder ``partial``, made if need be, locked until it is closed."""
    for _ in range(_TRIES):
        try:
            partial.mkdir(exist_ok=True)
            # What a link leads to is not ours to clear.
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another conversion has just ended: the folder took its target's name
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ELOOP, errno.ENOTDIR):
                raise RefusedError(
                    f"{partial}: is a file or a link, where a folder for what is being written "
                    "was expected; move it away, or choose another target"
                ) from error
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(os.fstat(lock), os.lstat(partial)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise RefusedError(
                f"{target}: another conversion is writing to it at this moment ({partial.name})"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise RefusedError(f"{target}: another conversion to it ended at this moment; look again")


def _check_again(target: Path, overwrite: bool, partial: Path) -> None:
    """Another process may have finished between the look at the target and the lock."""
    try:
        check_existing(target, overwrite)
    except RefusedError:
        with suppress(OSError):
            partial.rmdir()  # unless there is something in it
        raise


@contextmanager
def _old_locked(target: Path) -> Iterator[None]:
    """Locks what stands at ``target``: it is removed under the name that the next one fills."""
    if not target.exists():
        yield
        return
    old = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"{target}: another conversion to it ended at this moment; look again"
            ) from None
        yield
    finally:
        os.close(old)


def _check_shared(folder: Path, ranks: Ranks) -> None:
    """Raises the same `RefusedError` on every rank where one does not see rank 0's folder."""
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
            f"{folder}: rank {blind} does not see the folder that rank 0 has made; the target must "
            "lie on a filesystem that every host shares, under the same path"
        )


@contextmanager
def _machine_failures(target: Path) -> Iterator[None]:
    """Turns what the machine raises while a target is written into one `FailedError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}: the disk is full; free some space or choose another target"
        raise FailedError(
            f"{error.filename or target}: {reason}; the target is as it was before"
        ) from error


def _end_early(partial: Path, fingerprint: str, error: BaseException) -> None:
    kept = journal.kept_bytes(partial, fingerprint)
    if not kept or isinstance(error, (RefusedError, UnusableError)):
        shutil.rmtree(partial, ignore_errors=True)
        return
    error.add_note(
        f"{partial} keeps {size(kept)} of it: the same command goes on from there; "
        "remove the folder if you will not run it again"
    )


def _put_in_place(partial: Path, target: Path) -> Path | None:
    """Gives ``partial`` the name ``target``; the name of what stood there, if anything."""
    if not target.exists() or not os.listdir(target):
        os.rename(partial, target)
        return None
    if _exchange(partial, target):
        return partial
    old = target.with_name(target.name + ".llamaconv-old")
    os.rename(target, old)
    os.rename(partial, target)
    return old


def _finish(old: Path | None, target: Path) -> None:
    """Removes ``old`` and sends the new name to the disk; it stands already, whatever happens."""
    try:
        if old is not None:
            shutil.rmtree(old)
        _sync_folder(target.parent)
    except OSError as error:
        left = f"; what is left of the old one is {old}" if old is not None and old.exists() else ""
        raise FailedError(
            f"{error.filename or target.parent}: {error.strerror or error}; {target} is the new one, "
            f"complete{left}"
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once with Linux's renameat2, False where there is no such call."""
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
