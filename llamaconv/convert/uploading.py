"""Build a target in a store, which becomes a checkpoint at the very end, or leaves nothing.

The file without which nobody takes the folder for a checkpoint is put last (`store.LAST`), once the
checks have read back everything else from the store. Whatever fails before that, and an
interruption, deletes what was put. If the process is killed, a `guard` does; if that is killed too,
the next conversion to the same address does (see `partial`).

Limits. An interrupted conversion starts again from nothing: an upload that was cut off cannot be
read. Nothing is replaced: a store has no exchange of two folders at once. Two conversions to one
address at once: the second is refused, by a condition on the put of its marker if the store knows
conditions (S3, Google's and Azure's do). A guard on another host, or none, leaves files
until the next conversion; let the bucket expire unfinished uploads, too.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.checkpoint.store_errors import as_failures, as_refusals, explain
from llamaconv.checkpoint.tensors import Location
from llamaconv.convert import partial
from llamaconv.convert.guard import Guard
from llamaconv.convert.store import Store
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import FailedError, RefusedError, first_few


def check_store_target(address: StoreAddress, source: Location, overwrite: bool, last: str) -> None:
    """Check the target of a conversion, before anything is written.

    Args:
        address: The folder to write.
        source: The source, which must not contain it, nor be inside it.
        overwrite: Whether the user asked to replace what is there, which is refused.
        last: The file that completes a checkpoint, from `store.LAST`.

    Raises:
        RefusedError: It must not or cannot be written.
    """
    if isinstance(source, RemoteFile):
        here, there = f"{address}/", f"{source}/"
        if here.startswith(there) or there.startswith(here):
            raise RefusedError(
                f"{address}: the target must not be inside the source, nor the source inside the "
                "target"
            )
    if address.scheme == "hf":
        raise RefusedError(f"{address}: nothing is written to the Hub. Name a folder")
    if not address.name:
        raise RefusedError(f"{address}: names no folder. Give a bucket and a folder in it")
    store = Store(address)
    with as_refusals(address, address):
        names = [*store.listed()]
        marker = partial.read_marker(store.fs, store.path)
        is_complete = last in names
        if marker and not is_complete:
            if not partial.is_abandoned(store.fs, store.path, marker):
                raise RefusedError(
                    f"{address}: another conversion is writing to it, on {marker.host} (process "
                    f"{marker.pid}). Wait for it, or choose another target. If it was killed, its files "
                    "are removed by a conversion that starts a quarter of an hour later"
                )
            return
    if names and overwrite:
        raise RefusedError(
            f"{address}: exists already, and --overwrite is for local folders: a store cannot exchange "
            "two folders at once, so the old checkpoint would be lost before the new one is there. "
            "Choose another target, and delete this one afterwards"
        )
    if names:
        raise RefusedError(
            f"{address}: exists already ({first_few(sorted(names), 3)}). Choose another target"
        )


@contextmanager
def uploaded(address: StoreAddress, last: str, ranks: Ranks = ALONE) -> Iterator[Store]:
    """Give a store to fill, in which ``address`` is a checkpoint after the block.

    If the block raises, nothing is left there; if that could not be done, a note of the error says
    so. Of several ranks, rank 0 puts what makes a checkpoint once every rank's block has ended.

    Args:
        address: The folder.
        last: The file to put last, from `LAST`.
        ranks: All ranks.

    Raises:
        RefusedError: It cannot be written, or another conversion writes there.
        FailedError: The store failed.
    """
    store = Store(address)
    marker = partial.own_marker(uuid.uuid4().hex, last)
    try:
        if ranks.first:
            _begin(store, marker)
        marker = partial.Marker(**ranks.broadcast(asdict(marker)))
    except BaseException as error:
        if ranks.first and not isinstance(error, RefusedError):
            _remove(store, marker, error)
        raise
    guard, beats = None, _Beats(store, marker)
    removes = True
    try:
        guard = _guard(address, marker)
        if ranks.first:
            beats.start()
        try:
            yield store
            if not ranks.first:
                removes = False  # from here on, rank 0 alone decides
                _dismiss(guard)
            ranks.all_gather(None)
        except BaseException as error:
            # Before files are deleted: nobody sends any more.
            ranks.abort(error)
            raise
        if ranks.first:
            _put_last(store, marker)
    except BaseException as error:
        beats.stop()
        if removes:
            _remove(store, marker, error)
        raise
    finally:
        beats.stop()
        _dismiss(guard)
    ranks.broadcast()


def _begin(store: Store, marker: partial.Marker) -> None:
    """Put the marker, where nobody writes; remove what a killed conversion left."""
    address = store.address
    with as_refusals(address, address):
        old = partial.read_marker(store.fs, store.path)
        if old is not None:
            if not partial.is_abandoned(store.fs, store.path, old):
                raise RefusedError(_just_begun(address))
            partial.remove(store.fs, store.path, old, even_complete=False)
        store.make_folder(partial.MARKER)
        path, content = store.path_of(partial.MARKER), marker.content()
        try:
            store.fs.pipe_file(path, content, mode="create")
        except Exception as error:
            # Drivers name the condition that does not hold in several ways.
            if isinstance(error, FileExistsError) or partial.read_marker(store.fs, store.path):
                raise RefusedError(_just_begun(address)) from None
            # A store that knows no conditions; if that is not the reason, this fails too.
            store.fs.pipe_file(path, content)
        # Another one may have begun and ended since this one looked.
        if found := sorted(name for name in store.listed() if partial.is_ours(name)):
            store.fs.rm_file(path)
            raise RefusedError(
                f"{address}: exists already ({first_few(found, 3)}). Choose another target"
            )


def _just_begun(address: StoreAddress) -> str:
    return (
        f"{address}: another conversion has just begun to write to it. Wait for it, or choose "
        "another target"
    )


def _put_last(store: Store, marker: partial.Marker) -> None:
    """Put what was held back, and at last what makes a checkpoint of it."""
    address = store.address
    with as_failures(address, address):
        there = partial.read_marker(store.fs, store.path)
        if there is None or there.conversion != marker.conversion:
            raise FailedError(
                f"{address}: the marker of this conversion ({partial.MARKER}) is gone or replaced; "
                "another conversion has taken over, or somebody has deleted it"
            )
        store.check_there(dict(store.sent))
        for name in sorted(store.held, key=lambda name: name == marker.last):
            store.send(name, store.held[name])
    # The marker of a complete checkpoint is ignored.
    with suppress(Exception):
        store.fs.rm_file(store.path_of(partial.MARKER))


def _remove(store: Store, marker: partial.Marker, error: BaseException) -> None:
    left = ""
    try:
        fs, path = store.fs, store.path
        if not partial.remove(fs, path, marker, even_complete=True, sent=store.sent):
            left = "it still lists files"
    except Exception as failed:
        left = explain(failed, store.address).text
    if left:
        error.add_note(
            f"{store.address}: what was sent could not be deleted ({left}). It is no checkpoint "
            f"without {marker.last}; a conversion to this address deletes it, if this process has "
            f"ended or {partial.MARKER} is a quarter of an hour old"
        )


def _guard(address: StoreAddress, marker: partial.Marker) -> Guard | None:
    if address.scheme == "memory":
        return None  # ends with this process
    try:
        return Guard(address, marker)
    except OSError:
        return None  # no more processes may be started; the next conversion removes what is left


def _dismiss(guard: Guard | None) -> None:
    if guard is not None:
        guard.dismiss()


class _Beats:
    """Puts the marker again and again, in a thread."""

    def __init__(self, store: Store, marker: partial.Marker) -> None:
        self._store, self._marker = store, marker
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="marker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._over.wait(partial.BEAT_SECONDS):
            with suppress(Exception):  # the next one, or what is sent meanwhile, tells
                there = partial.read_marker(self._store.fs, self._store.path)
                if there is not None and there.conversion == self._marker.conversion:
                    self._store.send(partial.MARKER, self._marker.content())
